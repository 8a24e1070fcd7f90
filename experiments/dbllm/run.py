"""Two bits, rounded and then scales trained alone: what the loss compares with (CE, KD, DAD), on DB-LLM's grid.

    python -m experiments.dbllm.run            # stories260k on text it writes itself, as DB-LLM calibrates

A scale a row: 64 inputs (172 in down_proj, which groups of 64 do not divide). ``uncertain``: KL to the float model at
the tenth of positions where it is least certain.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from calib.quantizers import AffineSpec, AnyWeight, DualBinarySpec, LevelSpec
from calib.tuning import tune_recipe
from experiments.recovery import Arm, Figures, Results, bench, loss_on, run_arm

HERE = Path(__file__).parent
RTN = AffineSpec(2, symmetric=False, granularity="channel")
GRIDS: dict[str, AnyWeight] = {
    "RTN, asymmetric": RTN,
    "SEQ, searched": LevelSpec(kind="seq", levels=4),
    "FDB, as published": DualBinarySpec(range="published"),
    "FDB, least squares": DualBinarySpec(),
}
LOSSES = {"CE": ("ce", None), "KD": ("kd", None), "DAD 0.5": ("dad", 0.5), "DAD 1": ("dad", 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "results-stories.json", {"steps": args.steps, "lr": args.lr, "batch": [16, 128]})
    found = bench("stories")

    def whole() -> Figures:
        return {split: loss_on(found.model, ids)[0] for split, ids in found.held.items()}

    results.run("float", 0, whole)
    arms = [Arm(name, weights) for name, weights in GRIDS.items()]
    for name, losses in (("FDB, least squares", LOSSES), ("RTN, asymmetric", ("KD",)), ("SEQ, searched", ("KD",))):
        for each in losses:
            loss, gamma = LOSSES[each]
            recipe = tune_recipe(None, loss, steps=args.steps, lr=args.lr, gamma=gamma)
            arms.append(Arm(f"{name} + {each}", GRIDS[name], recipe))
    for seed in range(args.seeds):
        for arm in arms:
            if args.only in arm.name:
                results.run(arm.name, seed, partial(run_arm, found, arm, seed))
    print(results.table(["bits", "test", "test_uncertain_kl"]))


if __name__ == "__main__":
    main()
