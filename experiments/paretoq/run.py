"""Bits against quality, rounded (scales searched) and trained (ParetoQ): 1, 1.58, 2, 3, 4 bits, a scale a row.

    python -m experiments.paretoq.run stories            # stories260k on its own text
    python -m experiments.paretoq.run wikitext           # a small Llama, trained first (minutes)
    python -m experiments.paretoq.run stories --figure

Cells already in results-*.json are not run again; --all adds those of ``max start``, where scales start from the
largest weight of a row, as ParetoQ's do, instead of from the least squared error.
Rates are the better of two on validation windows after 60 steps with seed 0: those of SEQ and LSQ at 1.58 and 2 bits
each its own, that of the binary grid SEQ's at 2 bits, those of 3 and 4 bits at 4.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from functools import partial
from pathlib import Path

import torch

from calib.quantizers import AffineSpec, AnyWeight, LevelSpec
from calib.tuning import Tuning, next_token_loss, tune, tune_recipe
from experiments.recovery import Arm, Bench, Figures, Results, batches, bench, loss_on, run_arm

HERE = Path(__file__).parent
PROBED = 60  # steps after which rates are compared
STEPS = {"stories": 60, "wikitext": 150}
TERNARY = AffineSpec(2, symmetric=True, granularity="channel", range="mse")  # {-1, 0, 1}: what LSQ has at 1.58 bits
GRIDS: dict[str, AnyWeight] = {
    "2 bit, SEQ": LevelSpec(kind="seq", levels=4),
    "1.58 bit, SEQ": LevelSpec(kind="seq", levels=3),
    "2 bit, LSQ": LevelSpec(kind="lsq", levels=4),
    "1.58 bit, LSQ": TERNARY,
    "1 bit, elastic": LevelSpec(kind="binary", levels=2),
    "3 bit, LSQ": LevelSpec(kind="lsq", levels=8),
    "4 bit, LSQ": LevelSpec(kind="lsq", levels=16),
    "1.58 bit, SEQ, max start": LevelSpec(kind="seq", levels=3, range="published"),
    "1.58 bit, LSQ, max start": TERNARY.with_(range="minmax"),
    "2 bit, SEQ, max start": LevelSpec(kind="seq", levels=4, range="published"),
    "2 bit, LSQ, max start": LevelSpec(kind="lsq", levels=4, range="published"),
}
LOW = [f"{bits} bit, {grid}" for bits in ("2", "1.58") for grid in ("SEQ", "LSQ")]
RATES = {**dict.fromkeys(LOW, (3e-3, 1e-3)), "4 bit, LSQ": (1e-3, 3e-4)}


def chosen_on(name: str) -> str:
    """The grid whose validation loss chose this grid's rate."""
    if name.startswith(("3", "4")):
        return "4 bit, LSQ"
    return next((low for low in LOW if name.startswith(low)), "2 bit, SEQ")


def best_rate(results: Results, found: Bench, name: str) -> float:
    def valid(lr: float) -> float:
        arm = Arm("", GRIDS[name], tune_recipe("paretoq", lr=lr, steps=PROBED))
        cell = results.run(f"{name}, at rate {lr}", 0, partial(run_arm, found, arm, 0))
        return float(cell["valid"])

    return min(RATES[name], key=valid)


def float_trained(found: Bench, lr: float, steps: int) -> Figures:
    """What the same steps do to the float model: how far it is from done, and how far its weights move."""
    model = copy.deepcopy(found.model)
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    tune([(named, 1.0)], next_token_loss(model), batches(found.train(0)), Tuning(steps, lr=lr, warmup=0.0))
    linears = [name for name in named if name.endswith("proj.weight")]
    moved, whole = (sum(float((named[n] - b * before[n]).square().sum()) for n in linears) for b in (1, 0))
    held = {split: loss_on(model, ids)[0] for split, ids in found.held.items()}
    return {**held, "movement": (moved / whole) ** 0.5, "lr": lr}


def recovered(results: Results, column: str) -> None:
    """Adds the share of the gap between rounded (scales searched) and float that training closed, in nats."""
    whole = results.cells["float"]["0"][column]
    for name in GRIDS:
        for seed, trained in results.cells.get(f"{name}, trained", {}).items():
            start = results.cells[f"{name.removesuffix(', max start')}, rounded"][seed][column]
            trained["recovered"] = (start - trained[column]) / (start - whole)
    results.save()


def figure(results: Results, part: str) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    colours = {"elastic": "tab:green", "SEQ": "tab:blue", "LSQ": "tab:orange"}
    for (kind, fill), (grid, colour) in itertools.product((("rounded", "none"), ("trained", "full")), colours.items()):
        for axis, column in zip(axes, ("test", "movement", "recovered"), strict=True):
            points = [
                (float(name.split(" ")[0]), figures[column])
                for name in GRIDS
                if name.endswith(grid)
                for figures in results.cells.get(f"{name}, {kind}", {}).values()
                if column in figures
            ]
            if points:
                style = {"linestyle": "", "marker": "o", "fillstyle": fill, "color": colour}
                axis.plot(*zip(*points, strict=True), label=f"{grid}, {kind}", **style)
    whole = results.cells["float"]["0"]["test"]
    axes[0].axhline(whole, linestyle=":", color="black")
    axes[0].set(ylabel="test loss, nats (dotted: float)", yscale="log")
    axes[1].set(ylabel="||W trained - W float|| / ||W float||")
    axes[2].set(ylabel="share of the gap recovered", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="bits")
    axes[0].legend()
    pyplot.tight_layout()
    pyplot.savefig(HERE / f"bits-{part}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["stories", "wikitext"])
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = STEPS[args.part]
    results = Results(HERE / f"results-{args.part}.json", {"steps": steps, "batch": [16, 128]})
    if not args.figure:
        found = bench(args.part)
        results.run("float", 0, lambda: {split: loss_on(found.model, ids)[0] for split, ids in found.held.items()})
        rates = {probe: best_rate(results, found, probe) for probe in RATES}
        results.settings["rates"] = rates
        for lr in sorted(set(rates.values())):
            results.run(f"float, trained on at rate {lr}", 0, partial(float_trained, found, lr, steps))
        for seed in range(args.seeds):
            for name, weights in GRIDS.items():
                if args.only not in name or ("max start" in name and not args.all):
                    continue
                results.run(f"{name}, rounded", seed, partial(run_arm, found, Arm("", weights), seed))
                lr = rates[chosen_on(name)]
                arm = Arm("", weights, tune_recipe("paretoq", lr=lr, steps=steps))
                results.run(f"{name}, trained", seed, partial(run_arm, found, arm, seed))
    recovered(results, "test")
    print(results.table(["bits", "test", "recovered", "movement"]))
    if args.figure:
        figure(results, args.part)


if __name__ == "__main__":
    main()
