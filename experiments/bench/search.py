"""OS+'s threshold search: the naive grid against ours, on the same 100 candidates.

    python -m experiments.bench.search [--json experiments/bench/results-search.json] [--model] [--reference]

naive: every candidate of the paper's linear grid (t = T k / 100) in fp32 on all 2048 rows, in reused buffers and
blocks of rows in cache. ours: ``search_fast`` on that grid. Both pay for the float target. Activations 8 bits, static,
per tensor; weights per channel. regret: exact loss of our pick over the least of the grid, less one. Seconds are CPU
seconds of one thread, naive and ours in turn in one process, the best of several rounds: only their ratio means
anything.

--model: on the sites of smollm2-135m (first 16 x 512 tokens of WikiText-2's validation text), the pick against the best
of its own 91 log-spaced candidates and of the paper's 100 linear ones, all scored exactly. Real losses are jagged, so
that two grids' bests differ by some percent.

--reference: the sites for which the reference implementation was measured, in its setting.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import calib
from calib.memory import reusing_pages
from calib.methods import OSPlus, ShiftScale, SiteView
from calib.quantizers import AffineSpec, qparams
from calib.recipe import Recipe
from calib.solvers import LinearObjective, Search, search_exhaustive, search_fast
from calib.solvers.os_plus import fast_grid
from experiments.machine import machine

TOKENS, CANDIDATES = 2048, 100
SHAPES = [(768, 3072), (4096, 4096)]  # outputs x inputs
INPUTS = AffineSpec(8, symmetric=False, granularity="tensor")
CACHED = 1 << 18
TEXT = Path("../shared/data/wikitext-2/valid.txt")
# CPU seconds and best loss over the identity's, of the reference implementation (one thread, 101 candidates)
REFERENCE = {
    "0.self_attn.q_proj": (79.0, 0.049),
    "0.mlp.gate_proj": (71.0, 0.160),
    "0.mlp.down_proj": (53.0, 0.060),
    "11.self_attn.q_proj": (80.0, 0.057),
    "11.mlp.down_proj": (3600.0, 0.096),
}
ONE_WINDOW = "11.mlp.down_proj"  # was measured on one window only: its grid has thousands of candidates


def planted(seed: int, outputs: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows [2048, n] in which one channel in 128 is 2 to 63 times as large as the others, and a weight."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, n, generator=g)
    count = max(4, n // 128)
    worst = torch.randperm(n, generator=g)[:count]
    x[:, worst] *= 10 ** (0.3 + 1.5 * torch.rand(count, generator=g))
    return x, torch.randn(outputs, n, generator=g) * n**-0.5


def linear_grid(absmax: Tensor, count: int = CANDIDATES) -> list[float]:
    """The paper's Algorithm 1: t = T k / count."""
    top = float(absmax.amax())
    return [top * k / count for k in range(count, 0, -1)]


def naive(x: Tensor, weight: Tensor, lo: Tensor, hi: Tensor, weights: AffineSpec, grid: Sequence[float]) -> Search:
    """The full grid in fp32: fake-quantize both sides in place, one GEMM, one pass over the error."""
    absmax, target = torch.maximum(-lo, hi), x @ weight.T
    xq, wq, y = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(target)
    block = max(1, CACHED // x.shape[1])

    def loss(scale: Tensor) -> float:
        step, zero = (float(p) for p in qparams((lo / scale).amin(), (hi / scale).amax(), INPUTS))
        for start in range(0, len(x), block):
            q = torch.div(x[start : start + block], scale, out=xq[start : start + block])
            q.div_(step).add_(zero).round_().clamp_(INPUTS.qmin, INPUTS.qmax).sub_(zero).mul_(step)
        for start in range(0, len(weight), block):
            q = torch.mul(weight[start : start + block], scale, out=wq[start : start + block])
            width = qparams(q.amin(1, keepdim=True), q.amax(1, keepdim=True), weights)[0]
            q.div_(width).round_().mul_(width)
        error = torch.mm(xq, wq.T, out=y).sub_(target)
        return float(error.square_().sum()) / len(x)

    return search_exhaustive(absmax, loss, grid)


def ours(x: Tensor, weight: Tensor, lo: Tensor, hi: Tensor, weights: AffineSpec, grid: Sequence[float]) -> Search:
    """As the engine searches a site, on a given grid."""
    exact = LinearObjective(x, weight, lo, hi, INPUTS, weights)
    return search_fast(torch.maximum(-lo, hi), exact.few(), exact, grid=grid)


def timed(run: Callable[[], Search]) -> tuple[float, Search]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def cell(shape: tuple[int, int], bits: int, seeds: int, rounds: int) -> dict[str, Any]:
    """naive and ours on seed 0, in turn; the regret of our pick on all seeds (the grid's losses by integer GEMM)."""
    weights, picks, regrets, row = AffineSpec(bits), 0, [], dict[str, Any]()
    for seed in range(seeds):
        x, weight = planted(seed, *shape)
        lo, hi = x.amin(0), x.amax(0)
        grid = linear_grid(torch.maximum(-lo, hi))
        arguments = (x, weight, lo, hi, weights, grid)
        if seed == 0:
            mine, slow = [], []
            for _ in range(rounds):
                mine.append(timed(functools.partial(ours, *arguments)))
                slow.append(timed(functools.partial(naive, *arguments)))
            seconds, full = min(slow, key=lambda r: r[0])
            fast_seconds, found = min(mine, key=lambda r: r[0])
            losses = dict(full.curve)
            row = {"naive_s": seconds, "ours_s": fast_seconds, "ratio": seconds / fast_seconds}
            row["integer_vs_float"] = abs(found.loss / losses[found.threshold] - 1)
        else:
            found = ours(*arguments)
            full = search_exhaustive(torch.maximum(-lo, hi), LinearObjective(x, weight, lo, hi, INPUTS, weights), grid)
            losses = dict(full.curve)
        picks += found.threshold == full.threshold
        regrets.append(losses[found.threshold] / full.loss - 1)
    row |= {
        "same_pick": f"{picks}/{seeds}",
        "seeds": seeds,
        "regret_max": max(regrets),
        "gain": full.loss / full.identity_loss,
    }
    return {"shape": f"{shape[0]}x{shape[1]}", "weight_bits": bits, **row}


def first_windows(tokenizer: Any, count: int) -> list[dict[str, Tensor]]:
    """The first ``count`` x 512 tokens of the text, on which the reference was measured. Other windows have other
    extremes, and the identity's loss goes with their square."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8")[:200_000])["input_ids"][: count * 512]
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in torch.split(torch.tensor(ids).view(-1, 512), 8)
    ]


def compare_sites(
    blocks: Sequence[int] | None, layers: int | None, dense: bool, windows: int = 16, **options: Any
) -> list[dict[str, Any]]:
    """One row a site of smollm2-135m: CPU seconds of the fast search, its loss over the identity's and over the best of
    a dense grid (dense=False: not searched)."""
    from model_zoo import sources

    model, tokenizer = sources.load_model(sources.resolve("smollm2-135m", progress=False), progress=False)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    rows, solve = [], OSPlus.solve

    def compared(self: OSPlus, site: SiteView, recipe: Recipe) -> ShiftScale:
        start = time.process_time()
        found = solve(self, site, recipe)
        row = {"site": site.name, "seconds": time.process_time() - start, **found.detail}
        rows.append(row)
        row["block"] = sum(1 for other in rows if other["site"] == site.name) - 1
        if dense and (blocks is None or row["block"] in blocks):
            start = time.process_time()
            shift = found.shift
            z = 0.0 if shift is None else shift
            absmax = torch.maximum(-(site.lo - z), site.hi - z)
            _, many = site.objective(shift, 1)
            own = search_exhaustive(absmax, many, fast_grid(absmax)).loss
            paper = search_exhaustive(absmax, many, linear_grid(absmax)).loss
            row |= {"over_best": found.detail["loss"] / own, "over_linear": found.detail["loss"] / paper}
            row["dense_seconds"] = time.process_time() - start
        return found

    with mock.patch.object(OSPlus, "solve", compared):
        result = calib.quantize(
            model,
            "w8a8-static",
            "os+",
            first_windows(tokenizer, windows),
            tokenizer=tokenizer,
            samples=windows,
            seq_len=512,
            progress=False,
            **options,
        )
    for row in rows:
        row.pop("curve", None)
        row["over_identity"] = row["loss"] / max(row["identity_loss"], 1e-30)
    print(f"  (engine's solve stage: {result.seconds['solve']:.0f} s wall)")
    return rows


def model_report(blocks: Sequence[int] | None) -> dict[str, Any]:
    """All sites, or those of some blocks, against whole grids."""
    print("\nsmollm2-135m, w8a8-static, 16 x 512 tokens, default recipe")
    sites = compare_sites(blocks, None, dense=True)
    judged = [row for row in sites if "over_best" in row]
    worst = max(judged, key=lambda row: row["over_best"])
    seconds = [row["seconds"] for row in sites]
    summary = {
        "sites": len(sites),
        "seconds_mean": sum(seconds) / len(seconds),
        "seconds_max": max(seconds),
        "judged": len(judged),
        "within_1_percent": sum(row["over_best"] <= 1.01 for row in judged),
        "worst_over_best": worst["over_best"],
        "mean_over_linear": sum(row["over_linear"] for row in judged) / len(judged),
        "worst_site": f"{worst['block']}.{worst['site']}",
    }
    for row in judged:
        print(
            f"  {row['block']:2d}.{row['site']:36s} {row['seconds']:5.2f} s, over the best of its grid"
            f" {row['over_best']:.4f}, of the linear one {row['over_linear']:.4f}"
        )
    print(f"  {summary}")
    return {"summary": summary, "sites": judged}


def reference_report() -> list[dict[str, Any]]:
    """The reference's sites in its setting."""
    print("\nreference's sites and setting: symmetric inputs, no shift, no prefix")
    setting = {"shift": False, "prefix": "none", "scheme_options": {"input_symmetric": True}}
    many, one = (compare_sites((), 12, dense=False, windows=count, **setting) for count in (16, 1))
    reference = []
    for key, (cpu, ratio) in REFERENCE.items():
        rows = one if key == ONE_WINDOW else many
        row = next(r for r in rows if f"{r['block']}.{r['site']}".startswith(key))
        reference.append(
            {
                "site": key,
                "reference_s": cpu,
                "reference_ratio": ratio,
                "seconds": row["seconds"],
                "ratio": row["over_identity"],
            }
        )
        print(
            f"  {key:22s} ours {row['seconds']:.2f} s, loss ratio {row['over_identity']:.4f};"
            f" reference {cpu:.0f} s, {ratio:.3f}"
        )
    return reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--blocks", help="of the model, to judge by the dense grid: 0,5,11 (default: all)")
    parser.add_argument("--seeds", type=int, nargs=2, default=(20, 3), help="at 768x3072 and at 4096x4096")
    parser.add_argument("--rounds", type=int, default=2, help="of timing")
    parser.add_argument("--keep-pages", action="store_true", help="with glibc's mallopt set, as the engine runs")
    parser.add_argument("--skip-shapes", action="store_true", help="keep those that the JSON file has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stack = contextlib.ExitStack()
    kept = options.keep_pages and stack.enter_context(reusing_pages())
    report: dict[str, Any] = {}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    report |= {"machine": machine(), "candidates": CANDIDATES, "tokens": TOKENS}
    if not options.skip_shapes:
        report |= {"rows": [], "mallopt": kept}
        print(f"{'shape':10s} W  naive s   ours s  ratio  same pick  regret (max)  int vs float")
        for shape, seeds in zip(SHAPES, options.seeds, strict=True):
            for bits in (8, 4):
                row = cell(shape, bits, seeds, options.rounds)
                report["rows"].append(row)
                print(
                    f"{row['shape']:10s} {bits}  {row['naive_s']:7.2f}  {row['ours_s']:7.3f}  {row['ratio']:5.1f}"
                    f"  {row['same_pick']:>9s}  {row['regret_max']:12.2e}  {row['integer_vs_float']:.1e}",
                    flush=True,
                )
    if (options.model or options.reference) and not TEXT.exists():
        print(f"--model and --reference need {TEXT}: skipped")
    else:
        blocks = None if options.blocks is None else [int(b) for b in options.blocks.split(",")]
        report |= {"model": model_report(blocks)} if options.model else {}
        report |= {"reference": reference_report()} if options.reference else {}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
