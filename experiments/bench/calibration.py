"""Wall time of a whole calibration over that of one plain forward of the same tokens, in one process.

    python -m experiments.bench.calibration [--json experiments/bench/results-calibration.json]

The forward is the float model's, stock transformers, logits included, on the batches that calibration gets; it runs
before and after, and the mean counts. The run reads the weights, calibrates, writes the checkpoint and verifies it in a
fresh process; ``calibration`` is it without the verification.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import calib
from calib.data import calibration_data
from experiments.machine import machine
from model_zoo.sources import load_model

DATA = Path("../shared/data/wikitext-2/valid.txt")


def forward_seconds(name: str, samples: int, seq_len: int, batch_size: int, data: Any) -> float:
    """One pass of the float model over the calibration batches; loading is not counted."""
    model, tokenizer = load_model(name, progress=False)
    tokens = calibration_data(data, tokenizer, samples, seq_len, 0, pack=True, batch_size=batch_size)
    with torch.no_grad():
        model(tokens[0]["input_ids"][:1, :32])
        start = time.perf_counter()
        for batch in tokens:
            model(**batch, use_cache=False)
    return time.perf_counter() - start


def run(name: str, scheme: str, method: str, samples: int, seq_len: int, batch_size: int, data: Any) -> dict[str, Any]:
    """One calibration between two forwards."""
    before = forward_seconds(name, samples, seq_len, batch_size, data)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = calib.quantize(
            name,
            scheme,
            method,
            data,
            Path(folder) / "out",
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            progress=False,
        )
        total = time.perf_counter() - start
    after = forward_seconds(name, samples, seq_len, batch_size, data)
    forward = statistics.mean([before, after])
    calibration = total - result.seconds["verify"]
    return {
        "model": name,
        "scheme": scheme,
        "method": method,
        "tokens": samples * seq_len,
        "forward": round(forward, 2),
        "forward_runs": [round(before, 2), round(after, 2)],
        "calibration": round(calibration, 2),
        "total": round(total, 2),
        "ratio": round(calibration / forward, 2),
        "ratio_verified": round(total / forward, 2),
        "peak_rss_mib": result.peak_rss_mib,
        "seconds": {stage: round(seconds, 2) for stage, seconds in result.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scheme", default="w8a8-static")
    parser.add_argument("--method", default="os+")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--data", default=str(DATA) if DATA.exists() else None, help="default: WikiText-2, valid")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = run(
        options.model,
        options.scheme,
        options.method,
        options.samples,
        options.seq_len,
        options.batch_size,
        options.data,
    )
    print(f"{found['model']}, {found['scheme']}, {found['method']}, {found['tokens']} tokens")
    print(f"plain forward       {found['forward']:8.1f} s  (before, after: {found['forward_runs']})")
    print(f"calibration         {found['calibration']:8.1f} s  {found['ratio']:.2f} x")
    print(f"with verification   {found['total']:8.1f} s  {found['ratio_verified']:.2f} x")
    print("stages: " + ", ".join(f"{stage} {seconds}" for stage, seconds in found["seconds"].items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "data": str(options.data), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
