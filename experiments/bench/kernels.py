"""How fast packed linears run here (input quantization, GEMM, rescale, bias) against float linears.

    python -m experiments.bench.kernels [--threads N] [--out experiments/bench/kernels.json]

Every cell times all kernels in turn, round after round, and keeps the best of each, so that the ratios
compare like with like even on a machine that others use. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.nn import ActivationQuantizer, QuantLinear
from calib.quantizers import AffineSpec, qparams
from experiments.machine import machine

SHAPES = [(576, 1536), (768, 3072), (4096, 4096)]  # outputs x inputs
ROWS = [1, 8, 128, 512]
CELL_SECONDS, ROUNDS = 2.0, 200  # whichever is reached first, at least three rounds
STATIC = AffineSpec(8, symmetric=False, granularity="tensor")
TOKEN = AffineSpec(8, symmetric=False, granularity="token", dynamic=True)


def packed(weight: Tensor, bias: Tensor, spec: AffineSpec, inputs: AffineSpec | None, affine: bool) -> QuantLinear:
    quantizer = ActivationQuantizer(inputs, weight.shape[1], shift=affine, rescale=affine)
    if quantizer.scale is not None and quantizer.zero_point is not None:
        scale, zero_point = qparams(torch.tensor(-4.0), torch.tensor(4.0), STATIC)
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)
    return QuantLinear.from_float(weight, bias, spec, quantizer).set_mode("packed")


def candidates(out: int, n: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> what runs it; the bf16 ones get their rows in bf16 (see ``cell``)."""
    weight, bias = torch.randn(out, n) * n**-0.5, torch.randn(out)
    low, low_bias = weight.bfloat16(), bias.bfloat16()
    eight, four = AffineSpec(8), AffineSpec(4, granularity="group", group_size=64)
    return {
        "fp32": lambda x: F.linear(x, weight, bias),
        "bf16": lambda x: F.linear(x, low, low_bias),
        "w8a8-static": packed(weight, bias, eight, STATIC, False),
        "w8a8-static, fused affine": packed(weight, bias, eight, STATIC, True),
        "w8a8 per token": packed(weight, bias, eight, TOKEN, False),
        "w4a16 group 64": packed(weight, bias, four, None, False),
        "w4a16 group 64, bf16": packed(weight, bias, four, None, False).to(torch.bfloat16),
    }


def cell(runs: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    """Best milliseconds of each."""
    inputs = {name: x.bfloat16() if "bf16" in name else x for name in runs}
    best = dict.fromkeys(runs, float("inf"))
    for name, run in runs.items():
        run(inputs[name])
    end = time.perf_counter() + CELL_SECONDS
    for done in range(ROUNDS):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run(inputs[name])
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(), "unit": "ms", "rows": []}
    print(json.dumps(report["machine"], indent=1))
    for out, n in SHAPES:
        runs = candidates(out, n)
        print(f"\n{out} x {n}{'':18}" + "".join(f"{f'M={rows}':>24}" for rows in ROWS))
        cells = {rows: cell(runs, torch.randn(rows, n)) for rows in ROWS}
        for name in runs:
            line = f"{name:28}"
            for rows, best in cells.items():
                ratio = {base: best[base] / best[name] for base in ("fp32", "bf16")}
                line += f"{best[name]:10.3f} ({ratio['fp32']:.1f}/{ratio['bf16']:.1f}x)".rjust(24)
                report["rows"].append({"out": out, "in": n, "rows": rows, "kernel": name, "ms": round(best[name], 4)})
                report["rows"][-1] |= {f"x_{base}": round(value, 2) for base, value in ratio.items()}
            print(line, flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nms (x fp32 / x bf16, higher is faster); written to {options.out}")


if __name__ == "__main__":
    main()
