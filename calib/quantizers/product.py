"""Products of integer codes, and whether this machine computes them exactly."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LONGEST = 1 << 16  # inputs of which every int32 sum of int8 products, zero point included, is safe from overflow
PROBES = [(1, 64, 32), (2, 129, 7), (33, 512, 48)]  # rows, inputs (at most 512: sums exact in fp32), outputs
Product = Callable[[Tensor, Tensor], Tensor]


def int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """int32 [M, out] of int8 codes [M, in] and weight [out, in]; CUDA wants more than 16 rows."""
    if codes.device.type == "cuda" and len(codes) <= 16:
        padded = torch.nn.functional.pad(codes, (0, 0, 0, 17 - len(codes)))
        return torch._int_mm(padded, weight.t())[: len(codes)]
    return torch._int_mm(codes, weight.t())


def inexact(product: Product, limit: int, device: str, shapes: Sequence[tuple[int, int, int]]) -> str:
    """Why ``product`` (int8 [m, k], [n, k] -> sums [m, n]) cannot be trusted with weights in [-limit, limit].

    Empty where it is exact on random codes and on the largest ones: without VNNI, large products saturate.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        for m, k, n in shapes:
            x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
            w = torch.randint(-limit, limit + 1, (n, k), dtype=torch.int8, generator=generator)
            x[0], w[0], w[1] = 127, limit, -limit
            if not torch.equal(product(x.to(device), w.to(device)).cpu().long(), x.long() @ w.long().t()):
                return f"is not exact on this {device} (no VNNI?)"
    except (AttributeError, RuntimeError, NotImplementedError) as error:  # absent, or refused by this build
        return f"does not run here: {' '.join(str(error).split())[:80]}"
    return ""


@functools.cache
def int_mm_refusal(limit: int, device: str = "cpu") -> str:
    """Why torch._int_mm should not run on the device; empty where it is exact and more than a plain loop."""
    if device == "cpu" and not _vnni():
        return "is a plain loop on this cpu (no VNNI)"
    return inexact(int_mm, limit, device, PROBES if device == "cpu" else [(17, 64, 32), (3, 128, 8)])


def _vnni() -> bool:
    """False on x86 without VNNI: there torch._int_mm is exact, and takes twenty times as long as the float product.

    Asked, not timed: a search that measured would take other ways, and end at other bits, from one run to the next.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return capable("avx512_vnni", "avx_vnni", unknown=True)


def capable(*names: str, unknown: bool) -> bool:
    """Whether torch finds any of the instructions on this CPU; unknown: where it does not say."""
    can: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(can.get(name, unknown)) for name in names)
