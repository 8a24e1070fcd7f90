"""What ``calib plan`` predicts against what the run then takes: peak memory, size of the output, time.

    python -m experiments.bench.plan [--json experiments/bench/results-plan.json]

Each run is a process of its own, verification included. The prediction is made right before it, from the config and a
probe of the machine. ``ratio`` is predicted over measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import calib
from experiments.bench.memory import MIB, child
from experiments.machine import machine

MODELS = ["../shared/models/stories260k", "minilm-l6", "smollm2-135m"]
DATA = "../shared/data/wikitext-2/valid.txt"


def compare(model: str, samples: int, seq_len: int, data: str | None) -> dict[str, Any]:
    """One model's row."""
    shape = {"samples": samples, "seq_len": seq_len, "batch_size": 8, "method": "os+"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        cost = calib.cost(model, progress=False, out=out, **shape)
        found = child({"model": model, "data": data, "out": str(out), **shape})
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    pairs = {
        "output_mib": (cost.output_bytes / MIB, size / MIB),
        "memory_mib": (cost.peak_bytes / MIB, found["peak_mib"]),
        "seconds": (cost.total_seconds, found["seconds"]["total"]),
    }
    row: dict[str, Any] = {"model": Path(model).name, **shape}
    for name, (predicted, measured) in pairs.items():
        row[name] = {"predicted": round(predicted, 3), "measured": round(measured, 3)}
        row[name]["ratio"] = round(predicted / measured, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--data", default=DATA if Path(DATA).exists() else None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for model in options.models:
        rows.append(compare(model, options.samples, options.seq_len, options.data))
        print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
