"""What low-bit weights cost to run on this machine, one row of input.

    python experiments/low_bit/speed.py linear                 # 4096 x 4096, M = 1, against fp32 and bf16 F.linear
    python experiments/low_bit/speed.py model OUT [SCHEME ..]  # smollm2: tokens/s and peak memory of generate()

``model`` writes the checkpoints below OUT and runs each model in a process of its own. ratio: its peak resident memory
over that of the imported libraries plus the files it read; nothing is added for activations.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import calib
from calib.evaluate import peak_rss_mib
from calib.model.machine import resident_bytes
from calib.nn import ActivationQuantizer, QuantLinear
from calib.quantizers import AffineSpec
from calib.recipe import SCHEMES
from model_zoo.sources import load_model

HERE = Path(__file__).parent
WIDTH, TOKENS, COPIES = 4096, 32, 8
LINEARS = ("w1a16", "w1.58a16", "w2a16", "w2a16-fdb", "w3a16", "w4a16")


def median(runs: Sequence[Callable[[], object]]) -> float:
    """Seconds of one run, in turn over copies of the weights, which no cache holds together."""
    times = []
    for run in [*runs, *runs]:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(runs) :])  # the first round prepares


def linear() -> dict[str, Any]:
    """Milliseconds of one row through each format, alternating with the float products it is held against."""
    weight, x = torch.randn(WIDTH, WIDTH), torch.randn(1, WIDTH)
    singles = [weight.clone() for _ in range(COPIES)]
    halves = [weight.bfloat16() for _ in range(COPIES)]
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name in LINEARS:
            spec = SCHEMES[name].weights
            published = spec.with_(range="minmax" if isinstance(spec, AffineSpec) else "published")
            module = QuantLinear.from_float(weight.to(dtype), None, published, ActivationQuantizer(None, WIDTH))
            module.set_mode("packed")
            row, copies = x.to(dtype), [copy.deepcopy(module) for _ in range(COPIES)]
            ms = {
                "ms": median([functools.partial(each, row) for each in copies]) * 1e3,
                "fp32_ms": median([functools.partial(F.linear, x, each) for each in singles]) * 1e3,
                "bf16_ms": median([functools.partial(F.linear, x.bfloat16(), each) for each in halves]) * 1e3,
            }
            key = f"{name}, {str(dtype).removeprefix('torch.')} model"
            figures[key] = {
                **ms,
                "kernel": copies[0].kernel.kernel_name,
                "bytes_a_weight": spec.bits_per_weight((4096, 4096)) / 8,
            }
            print(
                f"{key:28s} {copies[0].kernel.kernel_name:12s} {ms['ms']:8.2f} ms, "
                f"{ms['fp32_ms'] / ms['ms']:.2f} x fp32, {ms['bf16_ms'] / ms['ms']:.2f} x bf16",
                flush=True,
            )
    return figures


def generate(path: str, dtype: torch.dtype) -> dict[str, Any]:
    """In a fresh process: tokens a second and the peak, of the libraries and of everything."""
    baseline = resident_bytes()
    if Path(path).is_dir():
        model = calib.load(path, dtype=dtype)
        files = sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
    else:
        model, _ = load_model(path, dtype=dtype, progress=False)
        files = sum(p.nbytes for p in model.parameters())
    ids = torch.arange(5, 21)[None]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, **options)
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=TOKENS, **options)
    seconds = time.perf_counter() - start
    peak = int((peak_rss_mib() or 0) * 2**20)
    ratio = peak / (baseline + files)
    return {"tokens_per_s": TOKENS / seconds, "peak": peak, "baseline": baseline, "files": files, "ratio": ratio}


def models(out: Path, schemes: list[str]) -> dict[str, Any]:
    figures = {}
    for name in ["float", *schemes]:
        path = out / name
        if name != "float" and not path.is_dir():
            calib.quantize(
                "smollm2-135m", name, "rtn", out=path, format="calib", samples=2, seq_len=64,
                verified=False, progress=False, dtype=torch.bfloat16,
            )  # fmt: skip
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, __file__, "generate", "smollm2-135m" if name == "float" else str(path), dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures[f"{name}, {dtype}"] = found = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}, {dtype}", {k: round(v, 2) for k, v in found.items()}, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["linear", "model", "generate"])
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args()
    if args.part == "generate":
        print(json.dumps(generate(args.rest[0], getattr(torch, args.rest[1]))))
        return
    figures = linear() if args.part == "linear" else models(Path(args.rest[0]), args.rest[1:] or ["w2a16", "w4a16"])
    about = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    (HERE / f"results-speed-{args.part}.json").write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
