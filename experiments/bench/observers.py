"""How fast observers read activations, against this machine's own copy and GEMM.

    python -m experiments.bench.observers [--json experiments/bench/results-observers.json]

Inputs are cold: every call takes the next of enough distinct tensors to exceed the caches (the site pass alone sees
activations as the forward leaves them). All candidates of a cell run in turn, round after round, and the best of each
counts, so that ratios hold on a machine that others use (``load`` is the load average before; two threads need two idle
cores). GB/s count the bytes of the activations once, for the copy
those it reads and those it writes; quantile and sample look at some rows only and count all. The Gram counts
2 T n^2 operations, as many as the GEMM [T, n] x [n, n] it is compared with, though it does little more than half.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from calib.engine.state import SiteState
from calib.memory import reusing_pages
from calib.model import make_plan, observing
from calib.observers import Moments, Quantile, Range, RowSample
from calib.observers.quantile import ENOUGH
from calib.recipe import SCHEMES, Recipe
from experiments.machine import machine

SHAPES = [(2048, 576), (4096, 1536), (2048, 4096)]  # tokens x channels
COLD = 96 << 20  # bytes of distinct inputs a cell rotates through
SECONDS, ROUNDS = 3.0, 400  # a cell ends at whichever comes first, after three rounds
CAPACITY = 2048
BLOCK_TOKENS = [(1, 512), (4, 512)]  # batches x length for the site pass
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 1,
    "vocab_size": 512,
}
Runs = dict[str, Callable[[Tensor], Any]]


def best(runs: Runs, inputs: list[Tensor], seconds: float = SECONDS) -> dict[str, float]:
    """Best seconds of each, every call on the next input."""
    supply, found = itertools.cycle(inputs), dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run(next(supply))
    end = time.perf_counter() + seconds
    for done in range(ROUNDS):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            x = next(supply)
            start = time.perf_counter()
            run(x)
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def bandwidth(tokens: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    size = tokens * n * dtype.itemsize
    inputs = [torch.randn(tokens, n).to(dtype) for _ in range(max(3, COLD // size))]
    targets = itertools.cycle([torch.empty_like(x) for x in inputs])
    sample, quantile, stride = RowSample(n, CAPACITY), Quantile(), max(1, tokens * n // ENOUGH)
    for x in inputs[: 1 + 3 * CAPACITY // tokens]:
        sample.update(x)  # full, as in most of a run
    runs: Runs = {
        "copy": lambda x: next(targets).copy_(x),
        "range": Range(n).update,
        "moments": Moments(n).update,
        "quantile": lambda x: quantile.update(x[::stride]),
        "sample": sample.update,
    }
    seconds = best(runs, inputs)
    rate = {name: (2 if name == "copy" else 1) * size / s / 1e9 for name, s in seconds.items()}
    cell = {"tokens": tokens, "channels": n, "dtype": str(dtype).removeprefix("torch.")}
    shown = {name: round(value, 1) for name, value in rate.items()}
    return {**cell, "GB/s": shown, "range_over_copy": round(rate["range"] / rate["copy"], 3)}


def gram(tokens: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    inputs = [torch.randn(tokens, n).to(dtype) for _ in range(max(2, COLD // (tokens * n * dtype.itemsize)))]
    weight, plain, observer = torch.randn(n, n), torch.zeros(n, n), Moments(n, gram=True)
    out = torch.empty(tokens, n)
    runs: Runs = {"gram": observer.update}
    if dtype == torch.float32:
        runs |= {"gemm": lambda x: torch.mm(x, weight, out=out), "gemm x.T x": lambda x: torch.mm(x.T, x, out=plain)}
    else:  # the observer multiplies in fp32: against fp32's GEMM, conversion excluded
        full = inputs[0].float()
        runs |= {"gemm": lambda _: torch.mm(full, weight, out=out)}
    rate = {name: 2 * tokens * n * n / s / 1e9 for name, s in best(runs, inputs, 2 * SECONDS).items()}
    cell = {"tokens": tokens, "channels": n, "dtype": str(dtype).removeprefix("torch.")}
    shown = {name: round(value) for name, value in rate.items()}
    return {**cell, "GFLOP/s": shown, "gram_over_gemm": round(rate["gram"] / rate["gemm"], 3)}


def sites() -> tuple[LlamaForCausalLM, list[SiteState], list[str]]:
    """One block of SmolLM2-135M's shapes (random weights: time does not depend on them), its sites and their taps."""
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval()
    recipe = Recipe(scheme=SCHEMES["w8a8-static"])
    plan = make_plan(model, recipe, {"input_ids": torch.arange(32)[None]})
    (name,) = plan.blocks
    states = [
        SiteState(
            model.get_submodule(name), s, recipe, [recipe.scheme.weights] * len(s.consumers), whole=True, gram=False
        )
        for s in plan.blocks[name].sites
    ]
    return model, states, [state.site.groups[0][0] for state in states]


def site_pass(batch: int, length: int) -> dict[str, Any]:
    """What observing adds to a block's float forward: range, sample, quantile and second moment of every site."""
    model, states, taps = sites()
    block, tokens = model.model.layers[0], batch * length
    for state in states:
        state.needs_moments = True
    hidden = [torch.randn(batch, length, 576) for _ in range(max(4, COLD // (4 * tokens * 576)))]
    position = model.model.rotary_emb(hidden[0], torch.arange(length)[None])
    by_tap, spent = dict(zip(taps, states, strict=True)), dict.fromkeys(taps, 0.0)
    number = itertools.count()

    def take(path: str, x: Tensor) -> None:
        start = time.perf_counter()
        by_tap[path].observe(0, x, None, first=next(number) // len(taps) * tokens)
        spent[path] += time.perf_counter() - start

    def observed(x: Tensor) -> None:
        with observing({path: block.get_submodule(path) for path in taps}, take):
            block(x, position_embeddings=position)

    linears = {path: torch.randn(state.site.features, state.site.features) for path, state in by_tap.items()}
    for x in hidden[: 1 + 4 * CAPACITY // tokens]:
        observed(x)  # the samples are full, as in most of a run
    least = dict.fromkeys([*taps, "observe"], float("inf"))

    def timed(x: Tensor) -> None:
        spent.update(dict.fromkeys(taps, 0.0))
        observed(x)
        for path in (*taps, "observe"):
            least[path] = min(least[path], spent.get(path, sum(spent.values())))

    runs: Runs = {"forward": lambda x: block(x, position_embeddings=position), "observed": timed}
    for path, weight in linears.items():
        wide = [torch.randn(tokens, len(weight)) for _ in range(3)]
        turn = itertools.cycle(wide)
        runs[path] = lambda _, turn=turn, weight=weight: F.linear(next(turn), weight)
    seconds = best(runs, hidden, 2 * SECONDS)
    return {
        "batch": batch,
        "length": length,
        "us_per_token": {
            "forward": round(seconds["forward"] / tokens * 1e6, 2),
            "observe": round(least["observe"] / tokens * 1e6, 3),
        },
        "observe_over_forward": round(least["observe"] / seconds["forward"], 4),
        "observe_over_linear": {
            f"{path} ({len(weight)})": round(least[path] / seconds[path], 3) for path, weight in linears.items()
        },
    }


@reusing_pages()
@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    torch.manual_seed(0)
    settings = {"cold_bytes": COLD, "seconds": SECONDS, "rounds": ROUNDS, "capacity": CAPACITY, "quantile": ENOUGH}
    report: dict[str, Any] = {
        "machine": {**machine(), "numpy": np.__version__, "system": platform.system()},
        "settings": {**settings, "inputs": "cold", "bandwidth": "activations once; copy: read + written"},
        "runs": [],
    }
    report["machine"].pop("threads")
    print(json.dumps(report["machine"], indent=1))
    for threads in options.threads:
        torch.set_num_threads(threads)
        run: dict[str, Any] = {"threads": threads, "load": os.getloadavg()[0], "bandwidth": [], "gram": [], "sites": []}
        report["runs"].append(run)
        head = "".join(f"{name:>9}" for name in ("copy", "range", "moments", "quantile", "sample"))
        print(f"\n{threads} thread(s), GB/s{'':8}{head}   range/copy")
        for (tokens, n), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
            run["bandwidth"].append(cell := bandwidth(tokens, n, dtype))
            rates = "".join(f"{value:9.1f}" for value in cell["GB/s"].values())
            print(f"{tokens:5} x {n:<5} {cell['dtype']:10}{rates}{cell['range_over_copy']:12.0%}", flush=True)
        print(f"\nGFLOP/s{'':15}{'gram':>9}{'gemm':>9}   gram/gemm")
        for (tokens, n), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
            run["gram"].append(cell := gram(tokens, n, dtype))
            rates = "".join(f"{cell['GFLOP/s'][name]:9}" for name in ("gram", "gemm"))
            print(f"{tokens:5} x {n:<5} {cell['dtype']:10}{rates}{cell['gram_over_gemm']:12.0%}", flush=True)
        print("\nobserving a SmolLM2-135M block")
        for batch, length in BLOCK_TOKENS:
            run["sites"].append(cell := site_pass(batch, length))
            print(f"{batch} x {length} tokens: {json.dumps({k: v for k, v in cell.items() if 'o' in k})}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
