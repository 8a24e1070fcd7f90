"""float8 products: torch's scaled GEMM where the device has one; on a CPU it is slower than decoding the weight."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calib.quantizers import FLOAT8, Float8Spec

if TYPE_CHECKING:
    from calib.nn.linear import QuantLinear

MULTIPLE = 16  # what cuBLASLt wants of inputs and outputs
DEVICES = ("cuda",)
TOLERANCE = 2e-3  # of the largest sum: its accumulator holds some 14 bits


def fits(module: QuantLinear) -> bool:
    """Whether the module's products are those of two float8 matrices that ``linear`` multiplies here."""
    weight, given = module.weight_spec, module.input
    return (
        isinstance(weight, Float8Spec)
        and isinstance(given.spec, Float8Spec)
        and "group" not in (weight.granularity, given.spec.granularity)
        and not given.watches_rows
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
        and module.weight_scale.device.type in DEVICES
        and not refusal(module.weight_scale.device.type)
    )


def linear(module: QuantLinear) -> Callable[[Tensor], Tensor]:
    """x [..., in] -> y [..., out]: the codes' sums, times both scales, plus the bias, in fp32; dtype of x.

    The module must outlive it.
    """
    owner = weakref.ref(module)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        module = owner()
        assert module is not None and module.weight is not None
        shape, out = x.shape[:-1], module.out_features
        if x.numel() == 0:
            return x.new_zeros(*shape, out)
        codes, scale, _ = module.input.codes(module.input.transformed(x.reshape(-1, module.in_features)))
        y = product(codes, module.weight).mul_(scale).mul_(module.weight_scale.reshape(-1))
        if module.bias is not None:
            y.add_(module.bias)
        return y.to(x.dtype).view(*shape, out)

    return run


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """fp32 [M, out] of codes [M, in] and [out, in], the bits of float8 in int8."""
    one = torch.ones((), device=codes.device)
    x, w = codes.view(FLOAT8), weight.view(FLOAT8)
    return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


@functools.cache
def refusal(device: str) -> str:
    """Why the scaled GEMM cannot be trusted on a device; empty where its sums are right."""
    draw = torch.Generator().manual_seed(0)
    try:
        for m, k, n in ((1, 32, 16), (33, 512, 48)):
            x, w = (torch.randn(rows, k, generator=draw).to(FLOAT8) for rows in (m, n))
            want = x.float() @ w.float().t()
            got = product(*(t.view(torch.int8).to(device) for t in (x, w))).cpu()
            if not bool(((got - want).abs() <= TOLERANCE * want.abs().amax()).all()):
                return f"torch._scaled_mm is wrong on this {device}"
    except (AttributeError, RuntimeError, NotImplementedError, ValueError) as error:
        return f"torch._scaled_mm does not run here: {' '.join(str(error).split())[:80]}"
    return ""
