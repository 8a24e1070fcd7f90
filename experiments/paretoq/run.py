"""Bits against quality, rounded (scales searched) and trained (ParetoQ): 1, 1.58, 2, 3, 4 bits, a scale a row.

    python -m experiments.paretoq.run stories            # stories260k on its own text
    python -m experiments.paretoq.run wikitext           # a small Llama, trained first (minutes)
    python -m experiments.paretoq.run stories --figure

Cells already in results-*.json are not run again. The learning rate was the better of 1e-3 and 3e-3 on validation
windows, after 40 steps at 2 and 1.58 bits on ``stories``.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from calib.quantizers import AffineSpec, AnyWeight, LevelSpec
from calib.tuning import TuneRecipe, tune_recipe
from experiments.recovery import Arm, Figures, Results, bench, loss_on, run_arm

HERE = Path(__file__).parent
TERNARY = AffineSpec(2, symmetric=True, granularity="channel", range="mse")  # {-1, 0, 1}: what LSQ has at 1.58 bits
GRIDS: dict[str, AnyWeight] = {
    "2 bit, SEQ": LevelSpec(kind="seq", levels=4),
    "1.58 bit, SEQ": LevelSpec(kind="seq", levels=3),
    "2 bit, LSQ": LevelSpec(kind="lsq", levels=4),
    "1.58 bit, LSQ": TERNARY,
    "1 bit, elastic": LevelSpec(kind="binary", levels=2),
    "3 bit, LSQ": LevelSpec(kind="lsq", levels=8),
    "4 bit, LSQ": LevelSpec(kind="lsq", levels=16),
}


def recipe(lr: float, steps: int) -> TuneRecipe:
    return tune_recipe("paretoq", lr=lr, steps=steps)


def recovered(results: Results, column: str) -> None:
    """Adds the share of the gap between rounded and float that training closed, in nats."""
    whole = results.cells["float"]["0"][column]
    for name in GRIDS:
        for seed, trained in results.cells.get(f"{name}, trained", {}).items():
            gap = results.cells[f"{name}, rounded"][seed][column] - whole
            trained["recovered"] = (results.cells[f"{name}, rounded"][seed][column] - trained[column]) / gap
    results.save()


def figure(results: Results, part: str) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for column, axis in (("test", axes[0]), ("movement", axes[1])):
        for kind in ("rounded", "trained"):
            for name, cells in results.cells.items():
                points = [(figures["bits"], figures[column]) for figures in cells.values() if column in figures]
                if name.endswith(kind) and points:
                    axis.scatter(*zip(*points, strict=True), marker="ox"[kind == "trained"], label=name)
        axis.set(xlabel="bits a weight, scales included", ylabel={"test": "test loss, nats"}.get(column, column))
    axes[0].axhline(results.cells["float"]["0"]["test"], linestyle=":", color="black")
    axes[0].legend(fontsize=5)
    pyplot.tight_layout()
    pyplot.savefig(HERE / f"bits-{part}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["stories", "wikitext"])
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / f"results-{args.part}.json", {"steps": args.steps, "lr": args.lr, "batch": [16, 128]})
    if not args.figure:
        found = bench(args.part)

        def whole() -> Figures:
            return {split: loss_on(found.model, ids)[0] for split, ids in found.held.items()}

        results.run("float", 0, whole)
        for seed in range(args.seeds):
            for name, weights in GRIDS.items():
                if args.only in name:
                    for kind, trained in (("rounded", None), ("trained", recipe(args.lr, args.steps))):
                        arm = Arm(f"{name}, {kind}", weights, trained)
                        results.run(arm.name, seed, partial(run_arm, found, arm, seed))
    recovered(results, "test")
    print(results.table(["bits", "test", "recovered", "movement"]))
    if args.figure:
        figure(results, args.part)


if __name__ == "__main__":
    main()
