"""Cost against the number of samples and of processes.

    python -m experiments.bench.scaling [--json experiments/bench/results-scaling.json]

Every run is a process (or two, under torchrun, one thread each) of its own on smollm2-135m with method os+;
verification is off. The line is fitted by least squares to the process's CPU seconds, which other work on the machine
hardly changes; wall seconds of calibration alone stand beside them. Two processes are compared with one of one thread,
tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from experiments.machine import machine

STAGES = ("capture", "probe", "observe", "solve", "fold", "weights", "propagate", "write")


def run(out: Path, samples: int, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """What ``calib quantize --json`` says of one run."""
    start = [sys.executable, "-W", "ignore"]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*start, "-m", "calib", "quantize", options.model, "--out", str(out), "--no-verify", "--quiet", "--json"]
    command += ["--samples", str(samples), "--seq-len", str(options.seq_len), "--batch-size", "4", "--threads", "1"]
    if Path(options.data).exists():
        command += ["--data", options.data]
    command += ["--method", "os+"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))
    seconds, after = found["seconds"], resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "samples": samples,
        "processes": processes,
        "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "calibration": round(sum(seconds.get(stage, 0.0) for stage in STAGES), 2),
        "total": round(seconds["total"], 2),
        "peak_rss_mib": found["peak_rss_mib"],
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--shared", type=int, default=64, help="samples of the two-process comparison")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--data", default="../shared/data/wikitext-2/valid.txt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, same = [], {}
    with tempfile.TemporaryDirectory() as text:
        for samples in options.samples:
            rows.append(run(Path(text) / f"{samples}-1", samples, 1, options))
            print(rows[-1], flush=True)
        rows.append(run(Path(text) / "two", options.shared, 2, options))
        print(rows[-1], flush=True)
        a, b = tensors(Path(text) / f"{options.shared}-1"), tensors(Path(text) / "two")
        same = {"tensors": len(a), "different": sum(not torch.equal(a[k], b[k]) for k in a)}
    x = np.array([row["samples"] for row in rows if row["processes"] == 1], dtype=float)
    y = np.array([row["cpu"] for row in rows if row["processes"] == 1])
    slope, base = np.polyfit(x, y, 1)
    worst = float(np.abs(slope * x + base - y).max() / y.max())
    print(f"CPU seconds = {base:.1f} + {slope:.3f} samples, largest deviation {worst:.1%} of the longest run")
    print(f"two processes against one: {same['different']} of {same['tensors']} tensors differ")
    if options.json:
        fit = {"base": round(float(base), 2), "per_sample": round(float(slope), 4), "deviation": round(worst, 4)}
        found = {"machine": machine(), "seq_len": options.seq_len, "rows": rows, "fit": fit, "two_processes": same}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
