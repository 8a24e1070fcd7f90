"""Block reconstruction on SmolLM2-135M: rounding, clipping and what else can be learned by each block's output.

    python -m experiments.reconstruction.run [--only 'w3a16*'] [--seed 1]
    python -m experiments.reconstruction.run --figure

Symmetric weights, of A16 in groups of 64, else a scale a row; calibrated on 32 x 512 tokens of WikiText-2's validation
text, judged on 40 x 512 of its test text. ``learned``: rounding and clipping, 40 steps a block of two windows each;
``all learned``: static input scales and OS+'s shift and scale too. A cell takes 3 to 15 minutes of a core; those of
results-smollm2.json are not run again, and what experiments/accuracy has run is copied from its table.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch

from calib.options import LEARNED as EVERYTHING
from experiments.accuracy import run as accuracy
from experiments.accuracy.run import LEARNED, ON, PLAIN, Arm, cell, stored
from experiments.recovery import Figures, Results

HERE = Path(__file__).parent
PRESENT = accuracy.HERE / "results-smollm2.json"
DRIVER = accuracy.DRIVERS["smollm2"]
RTN, GPTQ = Arm("rtn", "rtn", PLAIN), Arm("gptq", "gptq", PLAIN)
ROUNDING = Arm("rtn, learned", "rtn", {**PLAIN, "refine": 40, "batch_size": 2})  # what AutoRound learns, and its start
ALL = Arm("gptq, prefix, learned", "gptq", LEARNED)
OSPLUS = {"": ON, ", learned": LEARNED, ", all learned": {**LEARNED, "learn": EVERYTHING}}
OS_PLUS = [("w4a8-static", name) for name in OSPLUS] + [("w4a8", ""), ("w4a8", ", learned")]
CELLS = [  # the most telling first
    ("w4a16", ALL),
    ("w3a16", GPTQ),
    ("w3a16", ALL),
    ("w4a16", ROUNDING),
    ("w4a16", GPTQ),
    *((scheme, Arm(f"os+,gptq, prefix{name}", "os+,gptq", OSPLUS[name])) for scheme, name in OS_PLUS),
    ("w4a8", RTN),
    ("w3a16", RTN),
    ("w4a16", RTN),
    ("w3a16", ROUNDING),
]
# Measured by experiments/accuracy/rivals on the same windows, 32 x 512 tokens of calibration, one thread.
RIVALS = {"w4a16": {"AutoRound": 26.97, "LLM Compressor's GPTQ": 31.57}, "w3a16": {"LLM Compressor's GPTQ": 86.8}}


def figure(results: Results) -> None:
    from matplotlib import pyplot

    schemes = list(
        dict.fromkeys(scheme for scheme, _ in CELLS if any(n.startswith(f"{scheme}, ") for n in results.cells))
    )
    _, axes = pyplot.subplots(1, len(schemes), figsize=(4.5 * len(schemes), 4))
    for axis, scheme in zip(axes, schemes, strict=True):
        for name, cells in results.cells.items():
            if name.startswith(f"{scheme}, "):
                points = [(f["cpu_seconds"], f["perplexity"]) for f in cells.values()]
                axis.scatter(*zip(*points, strict=True), label=name.removeprefix(f"{scheme}, "))
        for colour, (name, value) in zip(("grey", "silver"), RIVALS.get(scheme, {}).items(), strict=False):
            axis.axhline(value, linestyle="--", color=colour, label=name)
        axis.axhline(results.cells["float"]["0"]["perplexity"], linestyle=":", color="black", label="float")
        axis.set(title=scheme, xlabel="CPU seconds", ylabel="test perplexity")
        axis.legend(fontsize=7)
    pyplot.tight_layout()
    pyplot.savefig(HERE / "reconstruction.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="patterns of cells' names, separated by ;")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(HERE / "results-smollm2.json", {**DRIVER.settings, "test": "40 x 512"})
    present = stored(PRESENT)["cells"]

    def measure(scheme: str, arm: Arm) -> Figures:
        label = f"{scheme}, {arm.name}, seed {args.seed}"
        if label in present:
            return {**present[label], "from": "experiments/accuracy"}
        return cell(DRIVER, scheme, arm, args.seed)

    if not args.figure:
        results.run("float", 0, lambda: dict(present["float"]))
        for scheme, arm in CELLS:
            name = f"{scheme}, {arm.name}"
            if any(fnmatch(name, part) for part in args.only.split(";")):
                results.run(name, args.seed, partial(measure, scheme, arm))
    print(results.table(["bits", "perplexity", "cpu_seconds"]))
    if args.figure:
        figure(results)


if __name__ == "__main__":
    main()
