"""TBT's weights and elastic activations on a decoder: static input scales that learn against scales that are held.

    python -m experiments.tbt.run              # stories260k on its own text; TBT's distillation, all weights trained

Ternary (or two-level) weights with the statistic as scale, a scale a row; inputs of every linear on one static ternary
grid {-a, 0, a} a site (A2), its first scale searched, or 8 bits a token (A8). The published experiment is on BART.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from calib.quantizers import AffineSpec, LevelSpec
from calib.tuning import tune_recipe
from experiments.recovery import Arm, Figures, Results, bench, loss_on, run_arm

HERE = Path(__file__).parent
TERNARY = LevelSpec(kind="tbt", levels=3, range="published")
BINARY = LevelSpec(kind="binary", levels=2)
A2 = AffineSpec(2, symmetric=True, granularity="tensor", range="mse")
A8 = AffineSpec(8, symmetric=False, granularity="token", dynamic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "results-stories.json", {"steps": args.steps, "lr": args.lr, "batch": [16, 128]})
    found = bench("stories")

    def whole() -> Figures:
        return {split: loss_on(found.model, ids)[0] for split, ids in found.held.items()}

    results.run("float", 0, whole)
    recipe = tune_recipe("tbt", lr=args.lr, steps=args.steps)
    arms = [
        Arm(f"{name}, {kind}", weights, trained, inputs=inputs, elastic=kind != "trained, fixed inputs")
        for name, weights, inputs in (
            ("W1.58A2", TERNARY, A2),
            ("W1.58A8", TERNARY, A8),
            ("W1A2", BINARY, A2),
            ("W1A8", BINARY, A8),
        )
        for kind, trained in (("rounded", None), ("trained, fixed inputs", recipe), ("trained, elastic inputs", recipe))
        if inputs is A2 or kind != "trained, elastic inputs"  # nothing is elastic about dynamic inputs
    ]
    for seed in range(args.seeds):
        for arm in arms:
            if args.only in arm.name:
                results.run(arm.name, seed, partial(run_arm, found, arm, seed))
    print(results.table(["bits", "test"]))


if __name__ == "__main__":
    main()
