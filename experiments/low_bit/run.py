"""Grids of 1 to 4 bits, rounded after training: relative error on synthetic rows, then quality of real models.

    python experiments/low_bit/run.py synthetic         # 2048 x 1024, every grid, published and searched scales
    python experiments/low_bit/run.py smollm2           # WikiText-2 test perplexity, weights only
    python experiments/low_bit/run.py minilm            # SST-2 classifier: accuracy and logits error
    python experiments/low_bit/run.py smollm2 --figure  # size against quality, every arm
    python experiments/low_bit/run.py smollm2 --table   # the same in markdown

Finished cells are kept in results-<part>.json (results-<part>-8.json with --samples 8) and skipped on the next run;
--only 'A;B' runs cells whose name holds A or B. Calibration data are validation (WikiText-2) and train (SST-2) splits,
never test. Bits a weight are those stored: padded codes, scales and zero points.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import calib
from calib.evaluate import classification, perplexity
from calib.export.hf import set_mode
from calib.nn import QuantLinear
from calib.quantizers import AffineSpec, AnyWeight, DualBinarySpec, LevelSpec
from calib.recipe import Scheme
from calib.solvers import rounded
from calib.solvers.dual_binary import dual_scale
from calib.solvers.levels import level_codes
from model_zoo.sources import load_model

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
WIKITEXT, SST2 = SHARED / "data/wikitext-2", SHARED / "data/sst2"
SAMPLES = 32  # calibration windows of 512 tokens, unless asked for others
SMALL = {"samples": 2, "seq_len": 32}  # for what looks at no data


@dataclass
class Arm:
    """One grid at one granularity with one way to round."""

    name: str
    weights: AnyWeight
    method: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict)


def levels(kind: Any, count: int, group: int, range: Any = "mse") -> LevelSpec:
    return LevelSpec(kind=kind, levels=count, granularity="group", group_size=group, range=range)


def planes(group: int, range: Any = "mse") -> DualBinarySpec:
    return DualBinarySpec(granularity="group", group_size=group, range=range)


def affine(bits: int, group: int, symmetric: bool = False, range: Any = "minmax") -> AffineSpec:
    return AffineSpec(bits, symmetric, "group", group, range=range)


def arms() -> list[Arm]:
    found = [
        Arm("2 bit, asymmetric, RTN, g64", affine(2, 64), options=SMALL),
        Arm("2 bit, FDB, searched + feedback, g64", planes(64), "gptq"),
        Arm("2 bit, SEQ, searched, g64", levels("seq", 4, 64)),
        Arm("2 bit, asymmetric, RTN, g32", affine(2, 32), options=SMALL),
        Arm("2 bit, SEQ, searched, g32", levels("seq", 4, 32)),
        Arm("2 bit, SEQ, searched + feedback, g32", levels("seq", 4, 32), "gptq"),
        Arm("2 bit, FDB, searched, g64", planes(64)),
    ]
    grids: dict[str, tuple[AnyWeight, AnyWeight | None]] = {  # searched, and as published
        "1 bit, binary": (levels("binary", 2, 64), levels("binary", 2, 64, "published")),
        "1.58 bit, SEQ": (levels("seq", 3, 64), levels("tbt", 3, 64, "published")),
        "2 bit, SEQ": (levels("seq", 4, 64), levels("seq", 4, 64, "published")),
        "2 bit, FDB": (planes(64), planes(64, "published")),
        "2 bit, asymmetric": (affine(2, 64, range="mse"), None),
        "3 bit, SEQ": (levels("seq", 8, 64), levels("seq", 8, 64, "published")),
        "3 bit, LSQ": (levels("lsq", 8, 64), levels("lsq", 8, 64, "published")),
        "3 bit, asymmetric": (affine(3, 64, range="mse"), affine(3, 64)),
        "4 bit, SEQ": (levels("seq", 16, 64), levels("seq", 16, 64, "published")),
        "4 bit, LSQ": (levels("lsq", 16, 64), levels("lsq", 16, 64, "published")),
        "4 bit, asymmetric": (affine(4, 64, range="mse"), affine(4, 64)),
    }
    for name, (searched, plain) in grids.items():
        if plain is not None:
            found.append(Arm(f"{name}, RTN, g64", plain, options=SMALL))
        found.append(Arm(f"{name}, searched, g64", searched))
        found.append(Arm(f"{name}, searched + feedback, g64", searched, "gptq"))
        found.append(Arm(f"{name}, + bias correction, g64", searched, "gptq", {"bias_correction": True}))
        found.append(Arm(f"{name}, + OS+, g64", searched, "os+,gptq", {"bias_correction": True}))
    return list({arm.name: arm for arm in found}.values())


def relative_error(weight: Tensor, spec: AnyWeight, codes: Tensor, scale: Tensor, zero_point: Tensor) -> float:
    return float((spec.decode(codes, scale, zero_point) - weight).square().sum() / weight.square().sum())


def one_factor(weight: Tensor, spec: LevelSpec) -> float:
    """The least relative error when one of 33 factors in [0.2, 1] of the published scale serves all rows."""
    _, scale, zero_point = rounded(weight, spec)
    scales = [scale * factor for factor in torch.linspace(0.2, 1, 33)]
    return min(relative_error(weight, spec, level_codes(weight, s, spec), s, zero_point) for s in scales)


def synthetic() -> None:
    """Relative squared errors on Gaussian, Laplace and uniform rows."""
    draw = torch.Generator().manual_seed(0)
    uniform = torch.rand(2048, 1024, generator=draw) - 0.5
    rows = {
        "gaussian": torch.randn(2048, 1024, generator=draw),
        "laplace": -uniform.sign() * torch.log1p(-2 * uniform.abs()),
        "uniform": 2 * uniform,
    }
    specs: dict[str, AnyWeight] = {
        "binary": LevelSpec(kind="binary", levels=2, range="published"),
        **{kind: LevelSpec(kind=kind, levels=3, range="published") for kind in ("tbt", "twn", "absmean")},  # type: ignore[arg-type]
        **{
            f"{kind} {count} levels, {rule}": LevelSpec(kind=kind, levels=count, range=rule)  # type: ignore[arg-type]
            for kind, counts in (("seq", (3, 4, 8, 16)), ("lsq", (4, 8, 16)))
            for count in counts
            for rule in ("published", "mse")
        },
        "fdb g64, published": planes(64, "published"),
        "fdb g64, mse": planes(64),
        "asymmetric 2 bit g64, minmax": affine(2, 64),
    }
    figures: dict[str, Any] = {}

    def note(name: str, spec: AnyWeight, errors: dict[str, float]) -> None:
        bits = spec.bits_per_weight((2048, 1024))
        figures[name] = {"bits": bits, **{kind: round(error, 5) for kind, error in errors.items()}}
        print(f"{name:30s} bits {bits:.4f} ", "  ".join(f"{k} {v:.4f}" for k, v in errors.items()))

    for name, spec in specs.items():
        note(name, spec, {kind: relative_error(weight, spec, *rounded(weight, spec)) for kind, weight in rows.items()})
    for kind, count in (("seq", 3), ("seq", 4), ("lsq", 4), ("seq", 8), ("lsq", 8), ("seq", 16), ("lsq", 16)):
        spec = specs[f"{kind} {count} levels, published"]
        least = {name: one_factor(weight, spec) for name, weight in rows.items()}
        note(f"{kind} {count} levels, one factor", spec, least)
    spec, errors = planes(64), {}
    for kind, weight in rows.items():  # what choosing the sign of (a1, a2) by the granule is worth
        scale, zero_point = dual_scale(weight, spec, signs=(1.0,)), torch.empty(0)
        errors[kind] = relative_error(weight, spec, spec.encode(weight, scale), scale, zero_point)
    note("fdb g64, mse, one sign", spec, errors)
    about = {"shape": [2048, 1024], "seed": 0, "torch": torch.__version__}
    (HERE / "results-synthetic.json").write_text(json.dumps({**about, "errors": figures}, indent=1) + "\n")


def smollm2(arm: Arm | None, args: argparse.Namespace) -> dict[str, Any]:
    test = WIKITEXT / "test.txt"
    if arm is None:
        model, tokenizer = load_model("smollm2-135m", progress=False)
        return {"perplexity": perplexity(model, tokenizer, test, windows=args.windows).value}
    options = {"samples": args.samples, "seq_len": 512, "seed": args.seed, **arm.options}
    scheme = Scheme(name=arm.name, weights=arm.weights)
    result = calib.quantize(
        "smollm2-135m", scheme, arm.method, WIKITEXT / "valid.txt", progress=False, report=False, **options
    )
    set_mode(result.model, "packed")
    found = perplexity(result.model, result.tokenizer, test, windows=args.windows)
    return {"perplexity": found.value, "ci95": found.ci95, **cost(result, arm)}


def minilm(arm: Arm | None, args: argparse.Namespace) -> dict[str, Any]:
    folder = SHARED / "models/minilm-l6-sst2"
    model, tokenizer = load_model(folder, progress=False)
    reference = classification(model, tokenizer, SST2 / "test.tsv")
    if arm is None:
        return {"accuracy": reference.value, "ci95": reference.ci95}
    scheme = Scheme(name=arm.name, weights=arm.weights)
    options = {"seed": args.seed, **arm.options}
    result = calib.quantize(folder, scheme, arm.method, SST2 / "train.tsv", progress=False, report=False, **options)
    set_mode(result.model, "packed")
    found = classification(result.model, result.tokenizer, SST2 / "test.tsv")
    error = float((found.outputs - reference.outputs).square().mean())
    return {"accuracy": found.value, "logits_mse": error, **cost(result, arm)}


def cost(result: calib.Result, arm: Arm) -> dict[str, Any]:
    """Bits a quantized weight, bytes of the quantized linears' tensors, seconds of the run."""
    modules = [m for m in result.model.modules() if isinstance(m, QuantLinear)]
    weights = sum(m.in_features * m.out_features for m in modules)
    bits = sum(
        arm.weights.bits_per_weight((m.out_features, m.in_features)) * m.in_features * m.out_features for m in modules
    )
    stored = sum(t.nbytes for m in modules for t in m.state_dict().values())
    return {"bits": bits / weights, "stored_bytes": stored, "seconds": round(result.seconds["total"], 1)}


MARKS = {"RTN": "x", "searched": "o", "searched + feedback": "s", "+ bias correction": "^", "+ OS+": "D"}


def table(part: str, file: Path) -> None:
    """Every arm in markdown, by bits, then quality."""
    cells = json.loads(file.read_text())["cells"]
    measure = "perplexity" if part == "smollm2" else "logits_mse"
    print("| arm | bits | " + ("perplexity (95 %) | of float's |" if part == "smollm2" else "logits MSE | accuracy |"))
    print("|---|---|---|---|")
    for name, cell in sorted(cells.items(), key=lambda each: (each[1].get("bits", 0), each[1].get(measure, 0))):
        if name != "float" and part == "smollm2":
            low, high = cell["ci95"]
            spread = f"{cell[measure]:,.2f} ({low:,.1f} to {high:,.1f})"
            print(f"| {name} | {cell['bits']:.2f} | {spread} | {cell[measure] / cells['float'][measure]:,.2f} |")
        elif name != "float":
            print(f"| {name} | {cell['bits']:.2f} | {cell[measure]:.4f} | {100 * cell['accuracy']:.2f} |")


def figure(part: str, file: Path) -> None:
    """Every arm: a grid is a colour, a way to round a mark."""
    from matplotlib import pyplot

    cells = json.loads(file.read_text())["cells"]
    measure = "perplexity" if part == "smollm2" else "logits_mse"
    figure, axes = pyplot.subplots(figsize=(9, 5))
    colours: dict[str, Any] = {}
    for name, cell in cells.items():
        if "bits" in cell:
            grid, way = name.rsplit(", g", 1)[0].rsplit(", ", 1)
            colour = colours.setdefault(grid, pyplot.get_cmap("tab20")(len(colours)))
            axes.scatter(cell["bits"], cell[measure], color=colour, marker=MARKS[way])
    for grid, colour in colours.items():
        axes.scatter([], [], color=colour, label=grid)
    for way, mark in MARKS.items():
        axes.scatter([], [], color="grey", marker=mark, label=way)
    if measure in cells.get("float", {}):
        axes.axhline(cells["float"][measure], linestyle=":", color="black", label="float")
    label = {"perplexity": "perplexity, WikiText-2 test", "logits_mse": "squared error of the logits, SST-2 test"}
    axes.set(xlabel="bits a weight, scales included", ylabel=label[measure], yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / f"size-{file.stem.removeprefix('results-')}.png", dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["synthetic", "smollm2", "minilm"])
    parser.add_argument("--only", default="")
    parser.add_argument("--figure", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "synthetic":
        return synthetic()
    file = HERE / f"results-{args.part}{'' if args.samples == SAMPLES else f'-{args.samples}'}.json"
    if args.figure or args.table:
        return (figure if args.figure else table)(args.part, file)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__}
    about = {"machine": platform.machine(), **vars(args), "versions": versions}
    for arm in [None, *arms()]:
        results = json.loads(file.read_text()) if file.exists() else {"cells": {}}
        name = "float" if arm is None else arm.name
        if name in results["cells"] or not any(part in name for part in args.only.split(";")):
            continue
        figures = (smollm2 if args.part == "smollm2" else minilm)(arm, args)
        described = {} if arm is None else {"weights": repr(arm.weights), "method": arm.method, **arm.options}
        results = json.loads(file.read_text()) if file.exists() else {"cells": {}}  # two runs may fill one table
        results["cells"][name] = {
            **described,
            **figures,
            **{k: v for k, v in about.items() if k not in ("only", "figure", "table")},
        }
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(time.strftime("%H:%M:%S"), name, json.dumps(figures), flush=True)
    return None


if __name__ == "__main__":
    main()
