"""The low-rank term beside a quantized linear: y += (x A^T) B^T, in floats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from calib.nn.activation import apply_keeping_dtypes
from calib.quantizers import AffineSpec, decode, encode, minmax, qparams

BYTE = AffineSpec(8, symmetric=True, granularity="channel")


class SideBranch(nn.Module):
    """Factors A = ``down`` [r, in] and B^T = ``up`` [r, out], in the model's dtype or as int8 with a scale a basis.

    One arithmetic for every mode of the linear beside it, so that fake and packed stay the same bits.
    """

    down: Tensor
    up: Tensor
    down_scale: Tensor | None
    up_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, bits: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank, self.bits = rank, bits
        stored = dtype if bits is None else torch.int8
        for name, size in (("down", in_features), ("up", out_features)):
            self.register_buffer(name, torch.zeros(rank, size, dtype=stored))
            self.register_buffer(f"{name}_scale", None if bits is None else torch.ones(rank, 1, dtype=torch.float32))

    @classmethod
    def of(cls, b: Tensor, a: Tensor, bits: int | None, dtype: torch.dtype) -> SideBranch:
        """From B [out, r] and A [r, in]; bits: 8, or None for floats."""
        module = cls(a.shape[1], len(b), len(a), bits, dtype)
        for name, factor in (("down", a), ("up", b.T)):
            if bits is None:
                setattr(module, name, factor.to(dtype).contiguous())
                continue
            scale, zero_point = qparams(*minmax(factor, BYTE), BYTE)
            setattr(module, name, encode(factor, scale, zero_point, BYTE))
            setattr(module, f"{name}_scale", scale)
        return module

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B^T [r, out] as floats."""
        if self.down_scale is None or self.up_scale is None:
            return self.down, self.up
        zero = torch.zeros((), dtype=torch.int32, device=self.down.device)
        return decode(self.down, self.down_scale, zero, BYTE), decode(self.up, self.up_scale, zero, BYTE)

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.factors()
        return (x @ down.to(x.dtype).T) @ up.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SideBranch:
        apply_keeping_dtypes(self, fn, recurse, ("down_scale", "up_scale"))
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank}, bits={self.bits}"
