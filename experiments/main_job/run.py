"""The main job's table: quantize real models with each recipe, evaluate on test, print and keep every figure.

    python experiments/main_job/run.py smollm2          # WikiText-2 test perplexity
    python experiments/main_job/run.py minilm           # SST-2 classifier: accuracy and logits error

Finished cells are kept in results-<model>.json and skipped on the next run; --only 'A;B' runs the cells whose name
holds A or B, --again repeats them. Calibration data are validation (WikiText-2) and train (SST-2) splits, never test.
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
from transformers import DynamicCache

import calib
from calib.evaluate import classification, perplexity
from calib.nn import Prefix, QuantLinear
from calib.recipe import FOLDS
from model_zoo.sources import load_model

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
WIKITEXT, SST2 = SHARED / "data/wikitext-2", SHARED / "data/sst2"


@dataclass
class Cell:
    name: str
    scheme: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


MINMAX = {"scheme_options": {"input_range": "minmax"}}
NEAREST = {"prefix": "none"}
SMOLLM2 = [
    Cell("w8a8-static, no suppression", "w8a8-static", "rtn", NEAREST),
    Cell("w8a8-static, smoothquant 0.8", "w8a8-static", "smoothquant:0.8", NEAREST),
    Cell("w8a8-static, no suppression, prefix", "w8a8-static", "rtn"),
    Cell("w8a8-static, os+, exact folds, no prefix", "w8a8-static", "os+", {"sites": FOLDS, **NEAREST}),
    Cell("w8a8-static, os+, exact folds, prefix", "w8a8-static", "os+", {"sites": FOLDS}),
    Cell("w8a8-static, os+, prefix", "w8a8-static", "os+"),
    Cell("w8a8-static, hadamard,os+, prefix", "w8a8-static", "hadamard,os+"),
    Cell(
        "w8a8-static, hadamard,os+, float rows, no prefix",
        "w8a8-static",
        "hadamard,os+",
        {"float_rows": 0.005, **NEAREST},
    ),
    Cell("w8a8, no suppression", "w8a8", "rtn"),
    Cell("w8a8, smoothquant 0.8", "w8a8", "smoothquant:0.8"),
    Cell("w8a8, os+", "w8a8", "os+"),
    Cell("w8a8, hadamard,os+", "w8a8", "hadamard,os+"),
    Cell("w6a6-static, no suppression", "w6a6-static", "rtn", {**NEAREST, **MINMAX}),
    Cell("w6a6-static, hadamard,os+, prefix", "w6a6-static", "hadamard,os+"),
    Cell("w6a6-static, os+,gptq, prefix", "w6a6-static", "os+,gptq"),
    Cell("w6a6-static, hadamard,os+,gptq, prefix", "w6a6-static", "hadamard,os+,gptq"),
]
MINILM = [
    Cell("w8a8-static, min-max", "w8a8-static", "rtn"),
    Cell("w8a8-static, smoothquant 0.5", "w8a8-static", "smoothquant"),
    Cell("w8a8-static, os+, exact folds", "w8a8-static", "os+", {"sites": FOLDS}),
    Cell("w8a8-static, os+, shift only", "w8a8-static", "os+", {"scale": False}),
    Cell("w8a8-static, os+, scale only", "w8a8-static", "os+", {"shift": False}),
    Cell("w8a8-static, os+, shift always", "w8a8-static", "os+", {"shift": True}),
    Cell("w8a8-static, os+", "w8a8-static", "os+"),
    Cell("w6a6-static, min-max", "w6a6-static", "rtn", MINMAX),
    Cell("w6a6-static, mse ranges", "w6a6-static", "rtn"),
    Cell("w6a6-static, os+, min-max ranges", "w6a6-static", "os+", MINMAX),
    Cell("w6a6-static, os+, shift always", "w6a6-static", "os+", {"shift": True}),
    Cell("w6a6-static, os+", "w6a6-static", "os+"),
    Cell("w6a6-static, os+,gptq", "w6a6-static", "os+,gptq"),
]


def set_mode(model: torch.nn.Module, mode: str) -> None:
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.set_mode(mode)  # type: ignore[arg-type]


def float_with_prefix(tokens: list[int]) -> tuple[Any, Any]:
    """The float model behind float prefix tokens, the fair reference where a recipe uses a prefix."""
    model, tokenizer = load_model("smollm2-135m", progress=False)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    Prefix.from_tensors(tokens, [x.keys for x in cache.layers], [x.values for x in cache.layers]).install(model)
    return model, tokenizer


def smollm2(cell: Cell | None, args: argparse.Namespace) -> dict[str, Any]:
    if cell is None:
        model, tokenizer = load_model("smollm2-135m", progress=False)
        plain = perplexity(model, tokenizer, WIKITEXT / "test.txt", windows=40)
        primed = {}
        for token in (198, 30):  # "\n" and ".", the two that the choice has fallen on
            model, tokenizer = float_with_prefix([token])
            primed[str(token)] = perplexity(model, tokenizer, WIKITEXT / "test.txt", windows=40).value
        return {"perplexity": plain.value, "ci95": plain.ci95, "with_prefix": primed}
    options = {"samples": 64, "seq_len": 512, "seed": args.seed, **cell.options}
    result = calib.quantize("smollm2-135m", cell.scheme, cell.method, WIKITEXT / "valid.txt", **options)
    set_mode(result.model, "packed")
    found = perplexity(result.model, result.tokenizer, WIKITEXT / "test.txt", windows=40)
    return {"perplexity": found.value, "ci95": found.ci95, "prefix": result.report["prefix"], **_cost(result)}


def minilm(cell: Cell | None, args: argparse.Namespace) -> dict[str, Any]:
    folder = SHARED / "models/minilm-l6-sst2"
    if cell is None:
        model, tokenizer = load_model(folder, progress=False)
        found = classification(model, tokenizer, SST2 / "test.tsv")
        return {"accuracy": found.value, "ci95": found.ci95}
    reference = _reference(folder)
    result = calib.quantize(folder, cell.scheme, cell.method, SST2 / "train.tsv", **{"seed": args.seed, **cell.options})
    set_mode(result.model, "packed")
    found = classification(result.model, result.tokenizer, SST2 / "test.tsv")
    error = float((found.outputs - reference).square().mean())
    return {"accuracy": found.value, "ci95": found.ci95, "logits_mse": error, **_cost(result)}


_LOGITS: dict[Path, torch.Tensor] = {}


def _reference(folder: Path) -> torch.Tensor:
    if folder not in _LOGITS:
        model, tokenizer = load_model(folder, progress=False)
        _LOGITS[folder] = classification(model, tokenizer, SST2 / "test.tsv").outputs
    return _LOGITS[folder]


def _cost(result: calib.Result) -> dict[str, Any]:
    return {"seconds": {k: round(v, 2) for k, v in result.seconds.items()}, "peak_rss_mib": result.peak_rss_mib}


def _stored(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"cells": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=["smollm2", "minilm"])
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run, cells = (smollm2, SMOLLM2) if args.model == "smollm2" else (minilm, MINILM)
    file = HERE / f"results-{args.model}{'' if args.seed == 0 else f'-seed{args.seed}'}.json"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__}
    about = {"machine": platform.machine(), "threads": args.threads, "seed": args.seed, "versions": versions}
    results = _stored(file)
    for cell in [None, *cells]:
        name = "float" if cell is None else cell.name
        if not any(part in name for part in args.only.split(";")) or (name in results["cells"] and not args.again):
            continue
        start = time.perf_counter()
        figures = run(cell, args)
        described = (
            {} if cell is None else {"scheme": cell.scheme, "method": cell.method, "options": repr(cell.options)}
        )
        results = _stored(file)  # read anew: two runs may fill one table
        seconds = round(time.perf_counter() - start, 1)
        results["cells"][name] = {**described, **figures, "cell_seconds": seconds, **about}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(figures)[:200], flush=True)
    order = {"float": -1, **{cell.name: i for i, cell in enumerate(cells)}}
    for name, row in sorted(results["cells"].items(), key=lambda item: order.get(item[0], 99)):
        keys = [k for k in ("perplexity", "with_prefix", "accuracy", "logits_mse", "prefix") if k in row]
        shown = "  ".join(f"{k} {row[k]:.5f}" if isinstance(row[k], float) else f"{k} {row[k]}" for k in keys)
        print(f"{name:52s} {shown}")


if __name__ == "__main__":
    main()
