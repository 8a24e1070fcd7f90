"""Does it matter which text calibrates a model? Six ways to choose it, three targets, several draws.

    python -m experiments.sampling.run purity               # what the chosen windows are made of
    python -m experiments.sampling.run lowrank              # whitened low rank of one block, held-out output error
    python -m experiments.sampling.run loss --only os+      # quantize SmolLM2-135M, loss on and off the target

The pool mixes WikiText-2, GSM8K, MBPP and SST-2 texts, shuffled anew for every draw; a target is maths (GSM8K), code
(MBPP) or reviews (SST-2). Examples of a target, pool and evaluation windows are disjoint: the first two come from
train parts, the last from test parts. Finished cells are kept in results-<part>.json and skipped on the next run.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import calib
from calib.data import TokenData, calibration_data, generate_windows, read_documents, read_labelled, select
from calib.evaluate import perplexity
from model_zoo.sources import load_model, resolve

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared/data"
MODEL = "smollm2-135m"
TARGETS = ("maths", "code", "reviews")
WINDOWS, LENGTH, HELD_OUT = 16, 256, 10
EXAMPLES = 24_000  # characters of a target
POOL = {"maths": 250_000, "code": 90_000, "reviews": 250_000, "wiki": 450_000}  # characters; code is all there is
FEATURES = {"granular": None, "single": ["word"], "subword": ["subword"], "pieces": ["pieces"]}
ARMS = ("oracle", "granular", "single", "random", "wrong", "self")
CONSUMERS: dict[str, dict[str, Any]] = {  # what calibrates on the windows: one line each
    "os+": {"scheme": "w8a8-static", "method": "os+"},
    "gptq": {"scheme": "w4a16", "method": "gptq"},
}
BLOCK, RATIO = 10, 0.5  # of the low-rank part
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@functools.cache
def texts(name: str, split: str) -> list[str]:
    """The texts of one domain's train or test part."""
    if name == "maths":
        rows = map(json.loads, (DATA / f"gsm8k/{split}.jsonl").read_text().splitlines())
        return [f"{row['question']}\n{row['answer']}" for row in rows]
    if name == "code":  # tasks 11 to 510 are MBPP's test part
        rows = map(json.loads, (DATA / "mbpp/mbpp.jsonl").read_text().splitlines())
        return [f"{r['text']}\n{r['code']}" for r in rows if (11 <= r["task_id"] <= 510) == (split == "test")]
    if name == "reviews":
        return read_labelled(DATA / f"sst2/{split}.tsv")[0]
    text = "\n".join(read_documents(DATA / f"wikitext-2/{split}.txt"))
    return [part for part in text.split("\n = ") if len(part) > 200]


def draw_texts(draw: int) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """Examples of each target, and the shuffled pool."""
    shuffle = random.Random(draw)
    examples, pool = {}, []
    for name in (*TARGETS, "wiki"):
        mixed = list(texts(name, "train"))
        shuffle.shuffle(mixed)
        rest = iter(mixed)
        if name in TARGETS:
            examples[name] = list(until(rest, EXAMPLES))
        pool += [{"text": text, "label": name} for text in until(rest, POOL[name])]
    shuffle.shuffle(pool)
    return examples, pool


def until(rest: Iterator[str], characters: int) -> Iterator[str]:
    held = 0
    while held < characters:
        held += len(text := next(rest))
        yield text


@functools.cache
def words() -> Any:
    from model_zoo.sources import load_tokenizer

    return load_tokenizer(resolve(MODEL, progress=False))


def choose(draw: int, target: str, features: list[str] | None, uniform: float = 0.0) -> Any:
    examples, pool = draw_texts(draw)
    given = {"windows": WINDOWS, "seq_len": LENGTH, "uniform": uniform, "seed": draw, "features": features}
    return select(pool, examples[target], words(), **given)


def arm_windows(arm: str, target: str, draw: int) -> TokenData:
    """The calibration windows of one arm."""
    if arm in ("oracle", "wrong"):
        name = target if arm == "oracle" else TARGETS[(TARGETS.index(target) + 1) % len(TARGETS)]
        data: Any = draw_texts(draw)[0][name]
    elif arm == "self":
        data = generate_windows(load_model(MODEL, progress=False)[0], words(), WINDOWS, LENGTH, draw)
    else:
        data = choose(draw, target, FEATURES.get(arm), uniform=float(arm == "random")).texts
    return calibration_data(data, words(), WINDOWS, LENGTH, draw)


@functools.cache
def held_out(target: str) -> TokenData:
    return calibration_data(texts(target, "test"), words(), HELD_OUT, LENGTH)


# ---- purity ---------------------------------------------------------------------------------------------------------


def purity_cells(draws: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name in FEATURES:
        for draw in range(1, draws + 1):
            for target in TARGETS:
                yield f"{target}/{name}/{draw}", functools.partial(purity, target, name, draw)


def purity(target: str, name: str, draw: int) -> dict[str, Any]:
    report = choose(draw, target, FEATURES[name]).report
    share = report["labels"][f"given data: {target}"]
    kept = ("effective_sample_size", "tau", "kl_target_even", "kl_target_chosen", "chosen", "near_duplicates")
    return {"purity": share["importance"], "base": share["pool"], **{key: report[key] for key in kept}}


# ---- whitened low rank ----------------------------------------------------------------------------------------------


def lowrank_cells(draws: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for arm in ("oracle", "random", "granular", "single", "self"):  # wrong: another target's oracle, from its cell
        for draw in range(1, draws + 1):
            for target in TARGETS[:1] if arm in ("random", "self") else TARGETS:  # those two know no target
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
    return moments(held_out(target))


def low_rank(target: str, arm: str, draw: int) -> dict[str, Any]:
    """Output error of W cut to RATIO of its parameters in the metric of the arm's inputs, on each target's own."""
    errors = {name: [] for name in TARGETS}
    found = moments(arm_windows(arm, target, draw))
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


def loss_cells(draws: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "float", functools.partial(losses, None)
    for draw in range(1, draws + 1):
        for target in TARGETS:
            for consumer in CONSUMERS:
                for arm in ARMS:
                    work = functools.partial(quantized_losses, consumer, target, arm, draw)
                    yield f"{consumer}/{target}/{arm}/{draw}", work


def losses(model: nn.Module | None) -> dict[str, float]:
    """Mean loss, nats a token, on each target's held-out windows."""
    network = load_model(MODEL, progress=False)[0] if model is None else model
    return {
        name: float(perplexity(network, words(), "\n\n".join(texts(name, "test")), HELD_OUT, LENGTH).outputs.mean())
        for name in TARGETS
    }


def quantized_losses(consumer: str, target: str, arm: str, draw: int) -> dict[str, float]:
    data = list(arm_windows(arm, target, draw))
    sizes = {"samples": WINDOWS, "seq_len": LENGTH, "seed": draw}
    return losses(calib.quantize(MODEL, data=data, progress=False, **sizes, **CONSUMERS[consumer]).model)


# ---- tables ---------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    if not values:
        return "not run"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation} (n={len(values)})"


def purity_table(cells: dict[str, Any]) -> None:
    for target in TARGETS:
        for name in FEATURES:
            found = [cell for key, cell in cells.items() if key.startswith(f"{target}/{name}/")]
            if found:
                base = statistics.fmean(cell["base"] for cell in found)
                print(f"{target:8s} {name:9s} {spread([c['purity'] for c in found])}  base {base:.3f}")


def arm_table(cells: dict[str, Any], prefix: str, of: Callable[[str, str, str], str]) -> None:
    """Mean and spread over draws, on the target and off it (mean of the other two)."""
    draws = sorted({key.rsplit("/", 1)[1] for key in cells if "/" in key})
    for target in TARGETS:
        for arm in ARMS:
            found = [cells[key] for draw in draws if (key := of(target, arm, draw)) in cells]
            others = [statistics.fmean(cell[name] for name in TARGETS if name != target) for cell in found]
            print(f"{prefix}{target:8s} {arm:9s} {spread([c[target] for c in found]):30s} off {spread(others)}")


def lowrank_key(target: str, arm: str, draw: str) -> str:
    if arm in ("random", "self"):
        target = TARGETS[0]
    if arm == "wrong":
        target, arm = TARGETS[(TARGETS.index(target) + 1) % len(TARGETS)], "oracle"
    return f"{target}/{arm}/{draw}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["purity", "lowrank", "loss"])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cells whose name holds this")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    file = HERE / f"results-{args.part}.json"
    settings = {"windows": WINDOWS, "length": LENGTH, "held_out": HELD_OUT, "model": MODEL, "block": BLOCK}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__}
    results: dict[str, Any] = {"settings": settings, "versions": versions, "cells": {}}

    def stored() -> dict[str, Any]:  # read anew: two runs may fill one table
        return json.loads(file.read_text()) if file.exists() else results

    results = stored()
    cells = {"purity": purity_cells, "lowrank": lowrank_cells, "loss": loss_cells}[args.part](args.draws)
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
        arm_table(results["cells"], "", lowrank_key)
    else:
        for consumer in CONSUMERS:
            arm_table(results["cells"], f"{consumer} ", lambda t, a, d, c=consumer: f"{c}/{t}/{a}/{d}")


if __name__ == "__main__":
    main()
