"""Does it matter which text calibrates a model? Six ways to choose it, three targets, several draws.

    python -m experiments.sampling.run purity               # what the chosen windows are made of
    python -m experiments.sampling.run lowrank              # whitened low rank of one block, held-out output error
    python -m experiments.sampling.run loss                 # quantize a small Llama, loss on and off the target
    python -m experiments.sampling.run loss-smollm2         # the same for SmolLM2-135M: about a minute a cell
    python -m experiments.sampling.run figure               # of what there is

The pool mixes WikiText-2, GSM8K, MBPP and SST-2 texts, shuffled anew for every draw; a target is maths (GSM8K), code
(MBPP) or reviews (SST-2). Examples of a target, pool and evaluation windows are disjoint: the first two come from
train parts, the last from test parts. Finished cells are kept in results-<part>.json and skipped on the next run.

The small Llama (0.8 million parameters, stories260k's tokenizer) is trained here on the train parts of all four, once
for about ten minutes, and kept in out/: large enough to have domains, small enough to be quantized 165 times.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from scipy import stats
from torch import Tensor, nn

import calib
from calib.data import TokenData, calibration_data, generate_windows, select
from calib.evaluate import perplexity
from experiments.recovery import small_llama
from experiments.sampling.figure import Panel, plot
from experiments.sampling.text import DATA, TARGETS, draw_texts, texts, until
from model_zoo.sources import load_model, load_tokenizer, resolve

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
SMALL, STEPS = "small-llama", 2000
SIZES = {"purity": (16, 256, 0), "lowrank": (16, 256, 10), "loss": (16, 128, 32), "loss-smollm2": (16, 128, 8)}
TRAINING = {**dict.fromkeys((*TARGETS, "wiki"), 2_500_000), "code": 500_000}  # characters; of code four times all
FEATURES = {"granular": None, "single": ["word"], "subword": ["subword"], "pieces": ["pieces"]}
ARMS = ("oracle", "granular", "single", "random", "wrong", "self")
FEATURE_NAMES = {"granular": "all three", "single": "words", "subword": "subwords", "pieces": "pieces"}
ARM_NAMES = {"oracle": "target itself", "single": "words alone", "wrong": "wrong target", "self": "model's own"}
PAIRS = (
    ("wrong", "oracle"),
    ("granular", "oracle"),
    ("granular", "single"),
    ("granular", "random"),
    ("self", "random"),
)
CONSUMERS: dict[str, dict[str, Any]] = {  # what calibrates on the windows: one line each
    "os+": {"scheme": "w8a8-static", "method": "os+", "objective": "output"},  # as published, half the time
    "gptq": {"scheme": "w4a16", "method": "gptq"},
    "low-rank": {"scheme": "none", "method": "low_rank", "keep": 0.5},
}
BLOCK, RATIO = 10, 0.5  # of the low-rank part
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def source(part: str) -> str:
    """The model of a part of the experiment: a name or a folder."""
    return str(small_model()) if part == "loss" else MODEL


@functools.cache
def small_model() -> Path:
    """A folder with the small Llama, trained if need be."""
    folder = HERE.parents[1] / "out/sampling-llama"
    if not folder.is_dir():
        tokenizer = load_tokenizer(resolve(str(DATA.parent / "models/stories260k"), progress=False))
        rows = []
        for name in (*TARGETS, "wiki"):
            mixed = list(texts(name, "train"))
            random.Random(0).shuffle(mixed)
            ids = tokenizer("\n\n".join(until(itertools.cycle(mixed), TRAINING[name])), verbose=False)["input_ids"]
            rows.append(torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128))
        windows = torch.cat(rows)[torch.randperm(sum(map(len, rows)), generator=torch.Generator().manual_seed(0))]
        model = small_llama(windows[64:], windows[:64], STEPS, folder)
        tokenizer.save_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer)
    return folder


@functools.cache
def words(part: str) -> Any:
    return load_tokenizer(resolve(source(part), progress=False))


def choose(part: str, draw: int, target: str, features: list[str] | None, uniform: float = 0.0) -> Any:
    examples, pool = draw_texts(draw)
    windows, length, _ = SIZES[part]
    given = {"windows": windows, "seq_len": length, "uniform": uniform, "seed": draw, "features": features}
    return select(pool, examples[target], words(part), **given)


def arms() -> Iterator[tuple[str, str]]:
    """(target, arm) of every calibration there is: `random` and `self` know no target, `wrong` is another's oracle."""
    for arm in ("oracle", "random", "granular", "single", "self"):
        for target in TARGETS[:1] if arm in ("random", "self") else TARGETS:
            yield target, arm


def cell_of(target: str, arm: str) -> str:
    """Where the model of an arm is kept that is judged on a target."""
    if arm in ("random", "self"):
        target = TARGETS[0]
    if arm == "wrong":
        target, arm = TARGETS[(TARGETS.index(target) + 1) % len(TARGETS)], "oracle"
    return f"{target}/{arm}"


@functools.lru_cache(maxsize=2)
def arm_windows(part: str, target: str, arm: str, draw: int) -> TokenData:
    """The calibration windows of one arm."""
    windows, length, _ = SIZES[part]
    if arm == "oracle":
        data: Any = draw_texts(draw)[0][target]
    elif arm == "self":
        data = generate_windows(load_model(source(part), progress=False)[0], words(part), windows, length, draw)
    else:
        data = choose(part, draw, target, FEATURES.get(arm), uniform=float(arm == "random")).texts
    return calibration_data(data, words(part), windows, length, draw)


# ---- purity ---------------------------------------------------------------------------------------------------------


def purity_cells(draws: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name in FEATURES:
        for draw in range(1, draws + 1):
            for target in TARGETS:
                yield f"{target}/{name}/{draw}", functools.partial(purity, target, name, draw)


def purity(target: str, name: str, draw: int) -> dict[str, Any]:
    report = choose("purity", draw, target, FEATURES[name]).report
    share = report["labels"][f"given data: {target}"]
    kept = ("effective_sample_size", "tau", "kl_target_even", "kl_target_chosen", "chosen", "near_duplicates")
    return {"purity": share["importance"], "base": share["pool"], **{key: report[key] for key in kept}}


# ---- whitened low rank ----------------------------------------------------------------------------------------------


def lowrank_cells(draws: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for draw in range(1, draws + 1):
        for target, arm in arms():
            yield f"{target}/{arm}/{draw}", functools.partial(low_rank, target, arm, draw)


@functools.cache
def front() -> nn.Module:
    """The model up to the block that is measured."""
    model = load_model(MODEL, progress=False)[0]
    model.model.layers = model.model.layers[: BLOCK + 1]
    return model.model


@torch.no_grad()
def moments(data: TokenData) -> dict[str, Tensor]:
    """E x x^T, float64, of each linear's input."""
    block, found = front().layers[BLOCK], {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        found[name] = found.get(name, 0) + (rows.T @ rows).double()

    hooks = [block.get_submodule(n).register_forward_pre_hook(functools.partial(add, n)) for n in LINEARS]
    for batch in data:
        front()(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return {name: total / data.tokens for name, total in found.items()}


@functools.cache
def held_out_moments(target: str) -> dict[str, Tensor]:
    _, length, windows = SIZES["lowrank"]
    return moments(calibration_data(texts(target, "test"), words("lowrank"), windows, length))


def low_rank(target: str, arm: str, draw: int) -> dict[str, Any]:
    """Output error of W cut to RATIO of its parameters in the metric of the arm's inputs, on each target's own."""
    errors = {name: [] for name in TARGETS}
    found = moments(arm_windows("lowrank", target, arm, draw))
    for linear in LINEARS:
        weight = front().layers[BLOCK].get_submodule(linear).weight.detach().double()
        rank = int(RATIO * weight.numel() / sum(weight.shape))
        values, vectors = torch.linalg.eigh(found[linear])
        roots = values.clamp_min(float(values[-1]) * 1e-10).sqrt()
        u, s, v = torch.linalg.svd((weight @ vectors) * roots, full_matrices=False)
        cut = ((u[:, :rank] * s[:rank]) @ v[:rank] / roots) @ vectors.T
        for name in TARGETS:
            h = held_out_moments(name)[linear]
            lost = weight - cut
            errors[name].append(float(((lost @ h) * lost).sum() / ((weight @ h) * weight).sum()))
    return {name: statistics.fmean(values) for name, values in errors.items()}


# ---- loss of the quantized model ------------------------------------------------------------------------------------


def loss_cells(draws: int, part: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "float", functools.partial(losses, part, None)
    for draw in range(1, draws + 1):
        for target, arm in arms():
            for consumer in CONSUMERS:
                work = functools.partial(quantized_losses, part, consumer, target, arm, draw)
                yield f"{consumer}/{target}/{arm}/{draw}", work


def losses(part: str, model: nn.Module | None) -> dict[str, float]:
    """Mean loss, nats a token, on each target's held-out windows."""
    network = load_model(source(part), progress=False)[0] if model is None else model
    _, length, windows = SIZES[part]
    found = {}
    for name in TARGETS:
        text = "\n\n".join(until(itertools.cycle(texts(name, "test")), 8 * windows * length))
        found[name] = float(perplexity(network, words(part), text, windows, length).outputs.mean())
    return found


def quantized_losses(part: str, consumer: str, target: str, arm: str, draw: int) -> dict[str, float]:
    data = list(arm_windows(part, target, arm, draw))
    windows, length, _ = SIZES[part]
    sizes = {"samples": windows, "seq_len": length, "seed": draw, "progress": False, "report": False}
    return losses(part, calib.quantize(source(part), data=data, **sizes, **CONSUMERS[consumer]).model)


# ---- tables ---------------------------------------------------------------------------------------------------------


def spread(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    if not values:
        return "not run"
    deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):.{digits}f}{deviation}"


def purity_table(cells: dict[str, Any]) -> None:
    """Share of the chosen tokens that is the target's: mean ± standard deviation over draws, and the lowest."""
    print("| target | of the pool | " + " | ".join(FEATURE_NAMES.values()) + " |\n|---|---|" + "---|" * len(FEATURES))
    for target in TARGETS:
        row, bases = [], []
        for name in FEATURES:
            found = [cell for key, cell in cells.items() if key.startswith(f"{target}/{name}/")]
            row.append(f"{spread([c['purity'] for c in found])} ({min(c['purity'] for c in found):.3f})")
            bases += [cell["base"] for cell in found]
        print(f"| {target} | {statistics.fmean(bases):.3f} | " + " | ".join(row) + " |")


def arm_cells(cells: dict[str, Any], prefix: str, target: str, arm: str) -> list[dict[str, float]]:
    """The cells of an arm, draw after draw."""
    named = f"{prefix}{cell_of(target, arm)}/"
    return [cell for key, cell in sorted(cells.items()) if key.startswith(named)]


def off_target(cell: dict[str, float], target: str) -> float:
    return statistics.fmean(cell[name] for name in TARGETS if name != target)


def arm_table(cells: dict[str, Any], prefix: str, scale: float, digits: int) -> None:
    """Mean ± standard deviation over draws above float, on the target / off it (mean of the other two)."""
    zero = cells.get("float", dict.fromkeys(TARGETS, 0.0))
    above = {
        (arm, target): [{t: cell[t] - zero[t] for t in TARGETS} for cell in arm_cells(cells, prefix, target, arm)]
        for arm in ARMS
        for target in TARGETS
    }
    print(f"\n{prefix.rstrip('/') or 'low rank'}, draws: {sorted({len(found) for found in above.values()})}\n")
    print("| text | " + " | ".join(TARGETS) + " |\n|---|" + "---|" * len(TARGETS))
    for arm in ARMS:
        row = []
        for target in TARGETS:
            found = above[arm, target]
            on, off = [c[target] for c in found], [off_target(c, target) for c in found]
            row.append(f"{spread(on, scale, digits)} / {spread(off, scale, digits)}")
        print(f"| {ARM_NAMES.get(arm, arm)} | " + " | ".join(row) + " |")
    print()
    for one, other in PAIRS:
        draws = min(len(above[arm, target]) for arm in (one, other) for target in TARGETS)
        gaps = [
            statistics.fmean(above[one, t][draw][t] - above[other, t][draw][t] for t in TARGETS)
            for draw in range(draws)
        ]
        if len(gaps) > 1:
            half = float(stats.t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
            mean, names = statistics.fmean(gaps), (ARM_NAMES.get(one, one), ARM_NAMES.get(other, other))
            print(f"- {names[0]} less {names[1]}: {scale * mean:+.{digits}f} ± {scale * half:.{digits}f}")


def panels() -> list[Panel]:
    """Of the figure: on the target, draw by draw."""
    cells = {
        part: json.loads(f.read_text())["cells"] for part in SIZES if (f := HERE / f"results-{part}.json").exists()
    }
    purity = cells["purity"]
    found = {
        shown: {t: [c["purity"] for key, c in purity.items() if key.startswith(f"{t}/{name}/")] for t in TARGETS}
        for name, shown in FEATURE_NAMES.items()
    }
    drawn = [Panel("What n-grams find in a pool", "share of the chosen that is the target's", found, zero=False)]
    names = {arm: ARM_NAMES.get(arm, arm) for arm in ARMS}
    lost = {
        shown: {t: [c[t] for c in arm_cells(cells["lowrank"], "", t, arm)] for t in TARGETS}
        for arm, shown in names.items()
    }
    drawn.append(
        Panel(f"{MODEL}, block {BLOCK}: low rank, {RATIO} of weights", "relative output error on the target", lost)
    )
    for part, model in (("loss", "small Llama"), ("loss-smollm2", MODEL)):
        for consumer, options in CONSUMERS.items():
            of = cells.get(part, {})
            harm = {
                shown: {t: [c[t] - of["float"][t] for c in arm_cells(of, f"{consumer}/", t, arm)] for t in TARGETS}
                for arm, shown in names.items()
            }
            if any(values for by_target in harm.values() for values in by_target.values()):
                name = f"{model}: {consumer}, " + (
                    f"{options['keep']} of weights" if "keep" in options else options["scheme"]
                )
                drawn.append(Panel(name, "loss on the target above float's (nats)", harm))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*SIZES, "figure"])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cells whose name holds this")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if args.part == "figure":
        plot(
            panels(),
            HERE / "figure.png",
            "Which text calibrates a model? A dot is a draw of pool and examples, a bar their mean",
        )
        return
    file = HERE / f"results-{args.part}.json"
    windows, length, held_out = SIZES[args.part]
    settings = {"windows": windows, "length": length, "held_out": held_out, "model": MODEL, "block": BLOCK}
    if args.part == "loss":
        settings |= {"model": SMALL, "steps": STEPS}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__}
    results: dict[str, Any] = {"settings": settings, "versions": versions, "cells": {}}

    def stored() -> dict[str, Any]:  # read anew: two runs may fill one table
        return json.loads(file.read_text()) if file.exists() else results

    results = stored()
    if args.part == "purity":
        cells = purity_cells(args.draws)
    else:
        cells = lowrank_cells(args.draws) if args.part == "lowrank" else loss_cells(args.draws, args.part)
    for name, work in cells:
        if args.table or name in results["cells"] or args.only not in name:
            continue
        start = time.process_time()
        found = {**work(), "cpu_seconds": round(time.process_time() - start, 1)}
        results = stored()
        results["cells"][name] = found
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results["cells"][name])[:160], flush=True)
    if args.part == "purity":
        purity_table(results["cells"])
    elif args.part == "lowrank":
        arm_table(results["cells"], "", 100, 2)  # percent
    else:
        for consumer in CONSUMERS:
            arm_table(results["cells"], f"{consumer}/", 1000, 1)  # thousandths of a nat


if __name__ == "__main__":
    main()
