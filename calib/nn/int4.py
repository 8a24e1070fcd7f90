"""int4 products: ATen's kernels for a few bf16 rows and packed weights of up to four bits, on a CPU and on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calib.nn.tiles import tiled
from calib.quantizers import AffineSpec, DualBinarySpec, LevelSpec

if TYPE_CHECKING:
    from calib.nn.linear import QuantLinear

GROUPS = (32, 64, 128, 256)  # what the kernels take, with outputs in multiples of 16
BLOCK = 64  # outputs that the CPU's packed layout keeps together
ROWS = 64  # beyond, decoding the weight once costs less than decoding it for every row
DEVICES = ("cpu", "cuda")


def fits(module: QuantLinear) -> bool:
    """Whether ``linear`` multiplies the module's weight here."""
    spec, device = module.weight_spec, module.weight_scale.device.type
    if isinstance(spec, AffineSpec):
        holds = spec.bits == 4 and spec.symmetric
    elif isinstance(spec, LevelSpec):  # integers in -8..7
        holds = spec.levels <= 8 or not spec.odd
    else:
        holds = isinstance(spec, DualBinarySpec)
    return (
        holds
        and module.dtype == torch.bfloat16
        and spec.group_size in GROUPS
        and module.out_features % 16 == 0
        and device in DEVICES
        and not refusal(device)
    )


def linear(module: QuantLinear) -> Callable[[Tensor], Tensor]:
    """x [..., in] -> y [..., out]: few bf16 rows on the kernel (it rounds scales where 'fake' rounds weights), the
    rest tiled. Two planes lie side by side there, and the input before each: one sum. The module must outlive it.
    """
    quantizer, out, columns, matmul = module.input, module.out_features, module.in_features, tiled(module)
    scale, group, planes = module.weight_scale.float(), module.weight_spec.group_size, 1
    bias = None if module.bias is None else module.bias.to(torch.bfloat16)
    assert group is not None
    codes = module.codes()
    if isinstance(module.weight_spec, DualBinarySpec):
        codes, planes = torch.cat([codes & 1, (codes + 2) >> 1], dim=1), 2
        scale = torch.cat([scale[..., 0], scale[..., 1]], dim=1)
    else:
        codes = module.weight_spec.integers(codes)
    multiply = product(codes, scale.view(out, -1), group)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        rows = quantizer(x).reshape(-1, columns)
        if x.dtype != torch.bfloat16 or not 0 < len(rows) <= ROWS:
            return matmul(rows).view(*x.shape[:-1], out)
        y = multiply(rows if planes == 1 else rows.repeat(1, planes))
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], out)

    return run


def product(codes: Tensor, scale: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """bf16 x [M, in] -> x W^T, W of codes in -8..7 [out, in] and scales [out, in/group]."""
    pairs = torch.stack([scale.t(), torch.zeros_like(scale.t())], dim=-1).to(torch.bfloat16).contiguous()
    if codes.device.type == "cuda":
        nibbles = (codes + 8).to(torch.uint8)
        inner = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], inner)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x.contiguous(), packed, group, pairs)
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
    for i in range(0, len(codes), BLOCK):  # as int32 it is eight times what stays: the heap would keep the holes
        rows = codes[i : i + BLOCK].int().add_(8)
        packed[i : i + BLOCK] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows, 1)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, pairs)


@functools.cache
def refusal(device: str = "cpu") -> str:
    """Why the kernel of a device cannot be trusted; empty where its products are right."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (48, 128), dtype=torch.int8, generator=generator)
    # Powers of two as scales and small integers as inputs: exact in bf16 up to the rounding of the result.
    scale = 2.0 ** torch.randint(-3, 3, (48, 4), generator=generator)
    x = torch.randint(-3, 4, (3, 128), generator=generator)
    weight = (codes.unflatten(1, (4, 32)) * scale.unsqueeze(-1)).flatten(1)
    try:
        got = product(codes.to(device), scale.to(device), 32)(x.to(device, torch.bfloat16)).cpu().float()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"int4 does not run here: {' '.join(str(error).split())[:80]}"
    return "" if torch.allclose(got, x.float() @ weight.t(), rtol=1e-2) else f"int4 is wrong on this {device}"
