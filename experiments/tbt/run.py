"""Ternary and binary weights with elastic activations (TBT) on a small encoder-decoder that restores sentences.

    python -m experiments.tbt.run                        # trains the BART first (six minutes of a core)
    python -m experiments.tbt.run --only W2A2 --figure

Every linear of self-attention, cross-attention and the feed-forward parts has weights of 3 levels (W2, as TBT calls
it) or 2 (W1), a scale a row, and its input on 8 bits a token, or on one static grid: 2 bits (four codes), or 1 (+-a;
{0, a} behind the GELU). Rows of the token embedding are on the weights' grid where they are looked up. q, k, v and
probabilities enter attention on 8 bits in every arm: calib has no static grid there. The head stays float, as TBT's.

RTN is rounded with searched scales. TWN (two levels: the row's mean) and TBT are trained alike, with TBT's losses; TWN
holds the input scales, which were searched on the float model's activations, and TBT's learn. ``TBT, held inputs`` and
``TWN, elastic inputs`` have it the other way round. The rate is the better of two on validation sentences, W2A2, TBT,
seed 0.
"""

from __future__ import annotations

import argparse
import copy
import functools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import calib
from calib.nn import QuantLinear
from calib.quantizers import AffineSpec, AnyWeight, LevelSpec, straight
from calib.recipe import Scheme
from calib.tuning import tune_recipe
from experiments.recovery import Figures, Results, bits_of, trained
from experiments.tbt.bart import drawn, inputs_of, perplexity, rouge, trained_bart

HERE = Path(__file__).parent
RATES = (1e-3, 3e-3)
WEIGHTS: dict[str, dict[str, AnyWeight]] = {
    "W2": {
        "RTN": AffineSpec(2, symmetric=True, granularity="channel", range="mse"),
        "TWN": LevelSpec(kind="twn", levels=3, range="published"),
        "TBT": LevelSpec(kind="tbt", levels=3, range="published"),
    },
    "W1": {
        "RTN": LevelSpec(kind="binary", levels=2),
        "TWN": LevelSpec(kind="binary", levels=2, range="published"),
        "TBT": LevelSpec(kind="binary", levels=2, range="published"),
    },
}
EIGHT = AffineSpec(8, symmetric=False, granularity="token", dynamic=True)
INPUTS = {
    "A8": EIGHT,
    "A2": AffineSpec(2, symmetric=False, granularity="tensor", range="mse"),
    "A1": AffineSpec(1, symmetric=True, granularity="tensor", range="mse"),
}
COUNTED = AffineSpec(1, symmetric=False, granularity="tensor")  # {0, a}
FORMATS = ("W2A8", "W2A2", "W1A8", "W1A1")
ARMS = ("RTN", "TWN", "TBT", "TBT, held inputs", "TWN, elastic inputs")


def arms_of(form: str) -> tuple[str, ...]:
    """With 8 bits a token nothing is elastic, and then a row's mean for a scale is TWN and TBT at once."""
    if form.endswith("A8"):
        return ARMS[:3] if form.startswith("W2") else ("RTN", "TBT")
    return ARMS if form.startswith("W2") else ("RTN", "TWN", "TBT")


def embeddings_on_grid(model: Any, levels: Any) -> None:
    """Looked-up rows of the token embedding on TBT's grid: a scale a row, so rounding the row is rounding the table."""
    for module in (model.get_encoder(), model.get_decoder()):
        module.embed_tokens.register_forward_hook(lambda _, __, row: straight.tbt(row, levels))


def count_from_zero(model: nn.Module, scales: dict[str, Tensor]) -> None:
    """Inputs of fc2 come from a GELU: one bit of theirs is {0, a}, not +-a."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and name.endswith("fc2"):
            assert module.input.zero_point is not None
            module.input.spec = COUNTED
            module.input.scale, module.input.zero_point = scales[name], module.input.zero_point - 1


@torch.no_grad()
def elastic_starts(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """TBT's first scales of one-bit inputs that count from zero, by name."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.update(
                {name: straight.initial_activation_scale(args[0], 1, signed=False).reshape(1)}
            )
        )
        for name, module in model.named_modules()
        if name.endswith("fc2")
    ]
    model(**inputs_of(batch))
    for hook in hooks:
        hook.remove()
    return found


@functools.lru_cache(maxsize=1)
def rounded(form: str, kind: str, seed: int) -> calib.Result:
    """What arms that differ in their training start from."""
    teacher = trained_bart()
    scheme = Scheme(name=form, weights=WEIGHTS[form[:2]][kind], inputs=INPUTS[form[2:]], attention=EIGHT)
    data = [inputs_of(batch) for batch in drawn("train", 8, 100 + seed)]
    options = {"prefix": "none", "progress": False, "seed": seed, "inputs": "float", "sites": ("norm",)}
    result = calib.quantize(copy.deepcopy(teacher), scheme, "rtn", data, **options)  # type: ignore[arg-type]
    if form.endswith("A1"):
        count_from_zero(result.network, elastic_starts(teacher, data[-1]))
    return result


def measure(form: str, arm: str, seed: int, steps: int, lr: float) -> Figures:
    kind = arm.partition(",")[0]
    result, found = copy.deepcopy(rounded(form, kind, seed)), Figures()
    embeddings_on_grid(result.network, 3 if form.startswith("W2") else 2)
    if arm != "RTN":
        recipe = tune_recipe("tbt", lr=lr, steps=steps)
        found = trained(
            result, trained_bart(), drawn("train", steps, seed), recipe, seed, elastic=arm == "TBT" or "elastic" in arm
        )
    calib.export.hf.set_mode(result.network, "float")
    return {**found, **figures_of(result.network), "bits": bits_of(result.network)}


def figures_of(model: Any) -> Figures:
    valid, test = drawn("valid", 12, 1), drawn("test", 24, 2)
    return {"valid": perplexity(model, valid), "test": perplexity(model, test), **rouge(model, test[::4])}


def figure(results: Results) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(10, 3.5))
    for axis, column, name in zip(axes, ("test", "rougeL"), ("test perplexity", "ROUGE-L"), strict=True):
        for j, arm in enumerate(ARMS):
            for i, form in enumerate(FORMATS):
                values = [cell[column] for cell in results.cells.get(f"{form}, {arm}", {}).values()]
                places = [i + 0.15 * (j - 2)] * len(values)
                axis.plot(places, values, "osx^v"[j], color=f"C{j}", label=arm if i == 1 else None)
        axis.axhline(results.cells["float"]["0"][column], linestyle=":", color="black", label="float")
        axis.set(ylabel=name, xticks=range(len(FORMATS)), xticklabels=FORMATS)
    axes[0].set(yscale="log")
    axes[1].axhline(results.cells["noised text"]["0"]["rougeL"], linestyle="--", color="grey", label="noised text")
    axes[1].legend(fontsize=6)
    pyplot.tight_layout()
    pyplot.savefig(HERE / "tbt.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "results-bart.json", {"steps": args.steps, "batch": "16 sentences of 12 to 64 tokens"})
    results.run("float", 0, lambda: figures_of(trained_bart()))
    results.run("noised text", 0, lambda: rouge(None, drawn("test", 24, 2)[::4]))

    def valid(lr: float) -> float:
        cell = results.run(f"W2A2, TBT, at rate {lr}", 0, partial(measure, "W2A2", "TBT", 0, args.steps, lr))
        return float(cell["valid"])

    lr = results.settings["rate"] = min(RATES, key=valid)
    for seed in range(args.seeds):
        for form in ("W2A2", "W2A8", "W1A1", "W1A8"):
            for arm in arms_of(form):
                name = f"{form}, {arm}"
                probed = results.cells.get(f"{name}, at rate {lr}", {}).get(str(seed))
                run = partial(measure, form, arm, seed, args.steps, lr) if probed is None else partial(dict, probed)
                if args.only in name:
                    results.run(name, seed, run)
    results.save()
    print(results.table(["bits", "test", "rouge1", "rouge2", "rougeL"]))
    if args.figure:
        figure(results)


if __name__ == "__main__":
    main()
