"""The activation side of a quantized linear: fused affine, rotation, grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from calib.nn.hadamard import block_hadamard
from calib.quantizers import AffineSpec, encode, fake_quantize, minmax, qparams


class ActivationQuantizer(nn.Module):
    """x [..., n] -> rotate((x - shift) / rescale) -> grid.

    The affine is what no neighbour could absorb (design decision 3): RMSNorm and down_proj shifts, post-LN
    taps. Static grids hold ``scale`` [1] fp32 and ``zero_point`` [1] int32. With ``float_rows`` a row that
    leaves the static range (a massive first token) or holds NaN keeps its float values: rare rows, exact.
    Arithmetic is in fp32 (fp64 for fp64 input), and ``model.to(dtype)`` leaves the buffers in fp32. A NaN
    elsewhere comes out NaN of a dynamic grid and of ``forward``; the integer codes of a static grid cannot
    hold it.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    shift: Tensor | None
    rescale: Tensor | None

    def __init__(
        self,
        spec: AffineSpec | None,
        features: int,
        *,
        shift: bool = False,
        rescale: bool = False,
        hadamard: int = 1,
        float_rows: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.features, self.hadamard, self.float_rows = spec, features, hadamard, float_rows
        static = spec is not None and not spec.dynamic
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32) if static else None)
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32) if static else None)
        self.register_buffer("shift", torch.zeros(features, dtype=torch.float32) if shift else None)
        self.register_buffer("rescale", torch.ones(features, dtype=torch.float32) if rescale else None)

    def transform(self, x: Tensor) -> Tensor:
        """The affine and the rotation alone; dtype of x."""
        return self.transformed(x).to(x.dtype)

    def transformed(self, x: Tensor) -> Tensor:
        """``transform`` in fp32 (fp64 for fp64 input): what the grid sees."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.shift is not None:
            x = x - self.shift
        if self.rescale is not None:
            x = x / self.rescale if self.shift is None else x.div_(self.rescale)
        return block_hadamard(x, self.hadamard)

    def qparams_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for the transformed x: the static pair, or x's own, shaped to broadcast."""
        assert self.spec is not None
        if self.scale is not None and self.zero_point is not None:
            return self.scale, self.zero_point
        return qparams(*minmax(x, self.spec), self.spec)

    @property
    def watches_rows(self) -> bool:
        """True where rows that leave the range are computed in float: only a static range can be left."""
        return self.float_rows and self.scale is not None

    def outside(self, x: Tensor) -> Tensor:
        """Rows [...] (bool) of the transformed x over half a step outside the static range, or with NaN."""
        assert self.spec is not None and self.scale is not None and self.zero_point is not None
        scale, zero_point = self.scale.reshape(()), self.zero_point.reshape(())
        lo = (self.spec.qmin - zero_point - 0.5) * scale
        hi = (self.spec.qmax - zero_point + 0.5) * scale
        return ~((x.amin(dim=-1) >= lo) & (x.amax(dim=-1) <= hi))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (int8, shape of x), scale and zero point of the *transformed* x."""
        assert self.spec is not None
        scale, zero_point = self.qparams_for(x)
        return encode(x, scale, zero_point, self.spec), scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized, transformed x; dtype of x."""
        return self.on_grid(self.transformed(x)).to(x.dtype)

    def on_grid(self, t: Tensor) -> Tensor:
        """Fake-quantized t, which is transformed already."""
        if self.spec is None or t.numel() == 0:
            return t
        q = fake_quantize(t, *self.qparams_for(t), self.spec)
        return torch.where(self.outside(t).unsqueeze(-1), t, q) if self.watches_rows else q

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationQuantizer:
        apply_keeping_dtypes(self, fn, recurse, ("scale", "shift", "rescale"))
        return self

    def extra_repr(self) -> str:
        return f"{self.spec}, hadamard={self.hadamard}, float_rows={self.float_rows}"


def apply_keeping_dtypes(
    module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool, names: tuple[str, ...]
) -> None:
    """nn.Module._apply, but the named buffers only change device: ``.to(bf16)`` leaves their dtype."""
    before = {name: buffer for name in names if (buffer := getattr(module, name)) is not None}
    nn.Module._apply(module, fn, recurse)
    for name, buffer in before.items():
        after = getattr(module, name)
        if after.dtype != buffer.dtype:
            setattr(module, name, buffer.to(after.device))
