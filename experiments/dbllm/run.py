"""Two bits, rounded and then scales trained alone: what the loss compares with (CE, KD, DAD), on DB-LLM's grid.

    python -m experiments.dbllm.run wikitext   # the small Llama of experiments/paretoq, groups of 64
    python -m experiments.dbllm.run stories    # stories260k on text it writes itself, as DB-LLM calibrates

On ``stories`` a scale a row: 64 inputs, and 172 in down_proj, which groups of 64 do not divide. ``uncertain_kl``: KL to
the float model at the tenth of positions where it is least certain. The rate of every grid is the better of two on
validation windows with KD, seed 0; on ``stories`` it is 1e-3 for all.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calib.quantizers import AffineSpec, AnyWeight, DualBinarySpec, LevelSpec
from calib.tuning import tune_recipe
from experiments.recovery import Arm, Results, bench, loss_on, run_arm

HERE = Path(__file__).parent
LOSSES = {"CE": ("ce", None), "KD": ("kd", None), "DAD 0.5": ("dad", 0.5), "DAD 1": ("dad", 1.0)}
TRAINED = {
    "FDB, least squares": tuple(LOSSES),
    "RTN, asymmetric": ("KD",),
    "SEQ, searched": ("KD",),
}
RATES = {"wikitext": (1e-3, 3e-3), "stories": (1e-3,)}
STEPS = {"wikitext": 40, "stories": 60}


def grids(part: str) -> dict[str, AnyWeight]:
    size: dict[str, Any] = {"granularity": "group", "group_size": 64} if part == "wikitext" else {}
    return {
        "RTN, asymmetric": AffineSpec(2, symmetric=False, **{"granularity": "channel", **size}),
        "SEQ, searched": LevelSpec(kind="seq", levels=4, **size),
        "FDB, as published": DualBinarySpec(range="published", **size),
        "FDB, least squares": DualBinarySpec(**size),
    }


def figure(results: Results, part: str) -> None:
    from matplotlib import pyplot

    names = [name for name in results.cells if name != "float" and "rate" not in name]
    _, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for axis, column in zip(axes, ("test", "test_uncertain_kl"), strict=True):
        for name in names:
            values = [cell[column] for cell in results.cells[name].values()]
            axis.plot(values, [name] * len(values), "x" if "+" in name else "o", color="C1" if "+" in name else "C0")
        axis.set(xlabel={"test": "test loss, nats"}.get(column, "KL at the least certain tenth"), xscale="log")
    axes[0].axvline(results.cells["float"]["0"]["test"], linestyle=":", color="black")
    axes[0].invert_yaxis()
    pyplot.tight_layout()
    pyplot.savefig(HERE / f"losses-{part}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(STEPS))
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, weights = STEPS[args.part], grids(args.part)
    results = Results(HERE / f"results-{args.part}.json", {"steps": steps, "batch": [16, 128]})
    found = bench(args.part)
    results.run("float", 0, lambda: {split: loss_on(found.model, ids)[0] for split, ids in found.held.items()})

    def arm(grid: str, name: str, lr: float) -> Arm:
        loss, gamma = LOSSES[name]
        return Arm("", weights[grid], tune_recipe(None, loss, steps=steps, lr=lr, gamma=gamma))

    def valid(grid: str, lr: float) -> float:
        name = f"{grid} + KD, at rate {lr}"
        return float(results.run(name, 0, partial(run_arm, found, arm(grid, "KD", lr), 0))["valid"])

    rates = RATES[args.part]
    chosen = {grid: min(rates, key=partial(valid, grid)) if len(rates) > 1 else rates[0] for grid in TRAINED}
    results.settings["rates"] = chosen
    for seed in range(args.seeds):
        for grid in weights:
            if args.only in grid:
                results.run(grid, seed, partial(run_arm, found, Arm("", weights[grid]), seed))
            for name in TRAINED.get(grid, ()):
                label, lr = f"{grid} + {name}", chosen[grid]
                probed = results.cells.get(f"{label}, at rate {lr}", {}).get(str(seed))
                run = partial(run_arm, found, arm(grid, name, lr), seed) if probed is None else partial(dict, probed)
                if args.only in label:
                    results.run(label, seed, run)
    results.save()
    print(results.table(["bits", "test", "test_uncertain_kl"]))
    if args.figure:
        figure(results, args.part)


if __name__ == "__main__":
    main()
