"""The Outlier Suppression+ paper's BERT tables in miniature, beside the paper's own figures.

    python -m experiments.osplus.run table        # INT8 with weights per tensor (INT8*), INT8, INT6, INT4
    python -m experiments.osplus.run ablation     # shift and scale; objective; number of sentences
    python -m experiments.osplus.run show         # what is committed, mean and spread over the seeds

Model: MiniLM-L6 (BERT, post-LN) fine-tuned on SST-2. Weights, inputs of every linear, and q, k, v and probabilities of
attention are quantized to the same bits: inputs static per tensor, attention per token as it runs, weights symmetric
per channel. Calibration: 128 training sentences, drawn by the seed; judged on the test part: accuracy, and the mean
squared error of the logits against float. Finished cells are kept in results.json and skipped.

The paper quantizes BERT-base, its attention static as well, and clips by tokens; only the order of the rows can be
compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import calib
from calib.evaluate import classification
from calib.export.hf import set_mode
from experiments.accuracy.run import FLOAT_LOGITS, SST2, SST2_MODEL, float_logits, stored

FILE = Path(__file__).with_name("results.json")
SEEDS = (0, 1, 2)
EVERYWHERE: dict[str, Any] = {"sites": ("norm", "vo", "updown", "fc", "fused")}  # a post-LN tap is fused
RANGES = {"min-max": "minmax", "percentile": "percentile", "mse": "mse"}
PAPER = {  # BERT-base, SST-2 accuracy (Table 1), float 93.4; no figure for a row: the paper has none
    ("INT8*", "min-max"): 91.1,
    ("INT8*", "os+"): 92.7,
    ("INT8", "os+"): 93.6,
    ("INT6", "os+"): 92.4,
    ("INT4", "mse"): 50.3,
    ("INT4", "percentile"): 77.1,
    ("INT4", "os+"): 91.4,
}
ABLATION = {  # INT4 on SST-2 (Tables 4 and 5)
    "os+": 91.4,
    "os+, no shift": 89.3,
    "neither": 82.3,
    "os+, no shift, plain output": 89.1,
}


def scheme(setting: str) -> tuple[str, dict[str, Any]]:
    bits = int(setting.strip("INT*"))
    options: dict[str, Any] = {"weight_bits": bits, "input_bits": bits, "attention_bits": bits}
    return "w8a8-static", options | ({"weight_granularity": "tensor"} if setting.endswith("*") else {})


def table(only: str) -> None:
    for setting in ("INT8*", "INT8", "INT6", "INT4"):
        if only not in setting:
            continue
        for seed in SEEDS:
            for name, how in RANGES.items():
                cell(setting, name, seed, "rtn", how)
            cell(setting, "smoothquant 0.5", seed, "smoothquant:0.5", "mse", **EVERYWHERE)
            cell(setting, "os+", seed, "os+", "mse", **EVERYWHERE)


def ablation(only: str) -> None:
    for setting in ("INT6", "INT4"):
        if only not in setting:
            continue
        for seed in SEEDS:
            os_plus = {
                "os+, no shift": {"shift": False},
                "os+, always shift": {"shift": True},
                "os+, no scale": {"scale": False},
                "os+, plain output": {"objective": "output"},
                "os+, no shift, plain output": {"shift": False, "objective": "output"},
                **{f"os+, {n} sentences": {"samples": n} for n in (1, 8, 32)},
            }
            for name, options in os_plus.items():
                cell(setting, name, seed, "os+", "mse", **{**EVERYWHERE, **options})


def cell(setting: str, arm: str, seed: int, method: str, input_range: str, **options: Any) -> None:
    key = f"{setting}, {arm}, seed {seed}"
    found = stored(FILE)
    if key in found["cells"]:
        return
    if not FLOAT_LOGITS:
        found["float"] = float_logits()
    preset, formats = scheme(setting)
    start = time.process_time()
    result = calib.quantize(
        SST2_MODEL,
        preset,
        method,
        SST2 / "train.tsv",
        scheme_options={**formats, "input_range": input_range},
        **{"samples": 128, "seed": seed, "progress": False, **options},
    )
    cpu = time.process_time() - start
    set_mode(result.model, "packed")
    judged = classification(result.model, result.tokenizer, SST2 / "test.tsv")
    found["cells"][key] = {
        "setting": setting,
        "arm": arm,
        "seed": seed,
        "accuracy": judged.value,
        "logits_mse": float((judged.outputs - FLOAT_LOGITS["logits"]).square().mean()),
        "cpu_seconds": round(cpu, 1),
    }
    found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{key}: accuracy {judged.value:.4f}, logits MSE {found['cells'][key]['logits_mse']:.5f}", flush=True)


def show(only: str) -> None:
    found = stored(FILE)
    print(f"float: accuracy {found['float']['accuracy']:.4f}")
    print(f"{'':6s} {'':30s} {'accuracy, %':>16s} {'logits MSE':>21s}  paper, BERT-base")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in found["cells"].values():
        if only in each["setting"]:
            groups.setdefault((each["setting"], each["arm"]), []).append(each)
    for (setting, arm), same in sorted(groups.items(), key=lambda item: item[0][0] != "INT8*"):
        paper = PAPER.get((setting, arm), ABLATION.get(arm) if setting == "INT4" else None)
        cells = [spread([100 * c["accuracy"] for c in same], ".2f"), spread([c["logits_mse"] for c in same], ".4g")]
        print(f"{setting:6s} {arm:30s} {cells[0]:>16s} {cells[1]:>21s}  {paper or ''}")


def spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} +- {statistics.stdev(values):{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "ablation", "show"))
    parser.add_argument("--only", default="", help="part of a setting's name: INT4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"table": table, "ablation": ablation, "show": show}[args.what](args.only)


if __name__ == "__main__":
    main()
