"""A classifier at few bits, scales and norms trained: what each term of the ACKD-style loss adds.

    python -m experiments.ackd.run             # minilm-l6-sst2; half an hour of one core
    python -m experiments.ackd.run --figure

Trained on SST-2's training sentences, measured on its test split: accuracy, on the fifth with the least margin of the
float model too, and mean squared error of the logits against it.
"""

from __future__ import annotations

import argparse
import copy
import functools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import calib
from calib.data import read_labelled
from calib.evaluate import classification
from calib.export.hf import set_mode
from calib.tuning import Terms
from experiments.recovery import SHARED, Figures, Results
from model_zoo.sources import load_model

HERE = Path(__file__).parent
MODEL, SST2 = SHARED / "models/minilm-l6-sst2", SHARED / "data/sst2"
LOSSES = {
    "task": Terms(task=1),
    "+ KL": Terms(task=1, logits=1),
    "+ KL + MSE": Terms(task=1, logits=1, hidden=1),
    "+ KL + MSE + CDL": Terms(task=1, logits=1, hidden=1, contrast=0.1),
    "+ KL + MSE + CDL + SAR": Terms(task=1, logits=1, hidden=1, contrast=0.1, hardness=0.5, focus=0.5),
}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "W2A8": ("w2a8", {"weight_group": 64}),
    "W4A4": ("w4a4", {}),
}


def figures_of(model: torch.nn.Module, tokenizer: Any, reference: Tensor, labels: Tensor) -> Figures:
    set_mode(model, "float")  # the grids' values, in float arithmetic: the quickest
    logits = classification(model, tokenizer, SST2 / "test.tsv").outputs
    assert logits is not None
    margin = (reference[:, 0] - reference[:, 1]).abs()
    hard = margin <= margin.quantile(0.2)
    right = logits.argmax(1) == labels
    return {
        "accuracy": float(right.float().mean()),
        "hardest_fifth": float(right[hard].float().mean()),
        "logits_mse": float((logits - reference).square().mean()),
    }


@functools.lru_cache(maxsize=1)
def rounded(scheme: str, seed: int) -> calib.Result:
    """What the losses of a scheme and seed start from."""
    name, options = SCHEMES[scheme]
    given = {"samples": 64, "seed": seed, "progress": False, "scheme_options": options}
    return calib.quantize(MODEL, name, "rtn", SST2 / "train.tsv", **given)  # type: ignore[arg-type]


def figure(results: Results) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), sharey=True)
    for axis, column in zip(axes, ("accuracy", "hardest_fifth", "logits_mse"), strict=True):
        for i, scheme in enumerate(SCHEMES):
            for name in ("rounded", *LOSSES):
                values = [cell[column] for cell in results.cells.get(f"{scheme}, {name}", {}).values()]
                axis.plot(values, [f"{scheme}, {name}"] * len(values), "x", color=f"C{i}")
        axis.set(xlabel=column)
        if column != "logits_mse":
            axis.axvline(results.cells["float"]["0"][column], linestyle=":", color="black")
    axes[0].invert_yaxis()
    pyplot.tight_layout()
    pyplot.savefig(HERE / "ackd.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--figure", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawn = {"steps": args.steps, "lr": args.lr, "batch_size": args.batch_size}
    results = Results(HERE / "results-minilm.json", drawn)
    teacher, tokenizer = load_model(MODEL, progress=False)
    labels = torch.tensor(read_labelled(SST2 / "test.tsv")[1])
    reference = classification(teacher, tokenizer, SST2 / "test.tsv").outputs
    assert reference is not None
    results.run("float", 0, lambda: figures_of(teacher, tokenizer, reference, labels))

    def measure(scheme: str, loss: Terms | None, seed: int) -> Figures:
        result = copy.deepcopy(rounded(scheme, seed))
        if loss is None:
            return figures_of(result.model, tokenizer, reference, labels)
        samples = args.steps * args.batch_size
        tuned = calib.tune(
            result,
            MODEL,
            SST2 / "train.tsv",
            preset="ackd",
            loss=loss,
            seed=seed,
            samples=samples,
            progress=False,
            **drawn,
        )
        return figures_of(tuned.model, tokenizer, reference, labels)

    for seed in range(args.seeds):
        for scheme in args.schemes:
            results.run(f"{scheme}, rounded", seed, partial(measure, scheme, None, seed))
            for name in args.losses:
                results.run(f"{scheme}, {name}", seed, partial(measure, scheme, LOSSES[name], seed))
    print(results.table(["accuracy", "hardest_fifth", "logits_mse"]))
    if args.figure:
        figure(results)


if __name__ == "__main__":
    main()
