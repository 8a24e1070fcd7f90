"""Codes of a layer's input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from calib.nn.activation import ActivationQuantizer
from calib.nn.hadamard import block_hadamard

BLOCK = 1 << 19  # activations quantized at a time: larger temporaries page-fault on every call, up to 5x
CACHED = 1 << 17  # activations that pass from one operator to the next within a core's own cache
_TOP_BIT = torch.tensor(-128, dtype=torch.int8)


Quantize = Callable[[Tensor], "Codes"]


class Codes:
    """Rows [M, in] on a grid. scale, zero_point: of the grid. outside: bool [M], rows that need float, None: none."""

    __slots__ = ("_codes", "_flipped", "outside", "scale", "zero_point")

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, outside: Tensor | None) -> None:
        self.scale, self.zero_point, self.outside = scale, zero_point, outside
        self._codes, self._flipped = codes, False

    @property
    def rows(self) -> int:
        return self._codes.shape[0]  # torch's len() is Python and costs more than some operators

    @property
    def signed(self) -> Tensor:
        """int8."""
        return self._as(flipped=False)

    @property
    def unsigned(self) -> Tensor:
        """uint8, each 128 more."""
        return self._as(flipped=True).view(torch.uint8)

    def _as(self, flipped: bool) -> Tensor:
        if flipped != self._flipped:  # code + 128 is the same byte with its top bit flipped
            self._codes.bitwise_xor_(_TOP_BIT)
            self._flipped = flipped
        return self._codes


def fingerprint(quantizer: ActivationQuantizer) -> bytes:
    """Equal of quantizers that give equal codes: grid, transform and their values."""
    found = hashlib.sha256(repr(quantizer.extra_repr()).encode())
    for name in ("scale", "zero_point", "shift", "rescale"):
        buffer = getattr(quantizer, name)
        found.update(b"-" if buffer is None else buffer.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.digest()


def quantize_for(quantizer: ActivationQuantizer) -> Quantize:
    """x [M, in] -> its codes, by the quantizer's buffers as they are now.

    ``quantized`` for every quantizer; of a static grid on a CPU the same arithmetic written out, the same bits: for few
    rows starting an operator costs more than its work, for many their results should not leave the cache.
    """
    spec = quantizer.spec
    assert spec is not None
    scale, zero_point, device = quantizer.scale, quantizer.zero_point, torch.device("cpu")
    if scale is None or zero_point is None or quantizer.watches_rows or scale.device != device or not spec.integer:
        return lambda x: quantized(quantizer, x)
    shift, rescale, hadamard = quantizer.shift, quantizer.rescale, quantizer.hadamard
    step = max(1, CACHED // quantizer.features)
    # as tensors: wrapping a number costs another microsecond
    offset = None if spec.symmetric else zero_point.float()

    def snapped(x: Tensor, room: Tensor | None) -> Tensor:
        """Codes as numbers, fp32; room: where they may lie."""
        t = x
        if shift is not None:
            t = torch.sub(t, shift, out=room)  # in fp32, as everything from here on
            if rescale is not None:
                t.div_(rescale)
        elif rescale is not None:
            t = torch.div(t, rescale, out=room)
        if hadamard != 1:
            t = block_hadamard(t.float(), hadamard)
        t = torch.div(t, scale, out=room) if t is x else t.div_(scale)
        if offset is not None:
            t.add_(offset)
        return spec.snap(t)

    def quantize(x: Tensor) -> Codes:
        if x.dtype == torch.float64:
            return quantized(quantizer, x)
        if x.shape[0] <= step:
            return Codes(spec.stored(snapped(x, None)), scale, zero_point, None)
        codes = torch.empty(x.shape, dtype=torch.int8)
        room = torch.empty(step, x.shape[1])
        for rows, part in zip(x.split(step), codes.split(step), strict=True):
            part.copy_(snapped(rows, room if rows.shape[0] == step else room[: rows.shape[0]]))
        return Codes(codes, scale, zero_point, None)

    return quantize


def quantized(quantizer: ActivationQuantizer, x: Tensor) -> Codes:
    """Codes of x [M, in], a block of rows at a time."""
    spec = quantizer.spec
    assert spec is not None
    whole = x.device.type != "cpu" or (spec.dynamic and spec.granularity == "tensor")
    step = len(x) if whole else max(1, BLOCK // x.shape[1])
    if len(x) <= step:
        t = quantizer.transformed(x)
        codes, scale, zero_point = quantizer.codes(t)
        return Codes(codes, scale, zero_point, _any(quantizer.outside(t)) if quantizer.watches_rows else None)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales, zero_points, outside = [], [], []
    for start in range(0, len(x), step):
        t = quantizer.transformed(x[start : start + step])
        codes[start : start + step], scale, zero_point = quantizer.codes(t)
        scales.append(scale)
        zero_points.append(zero_point)
        if quantizer.watches_rows:
            outside.append(quantizer.outside(t))
    rows = _any(torch.cat(outside)) if outside else None
    if quantizer.scale is not None:
        return Codes(codes, scales[0], zero_points[0], rows)
    return Codes(codes, torch.cat(scales), torch.cat(zero_points), rows)


def _any(rows: Tensor) -> Tensor | None:
    return rows if bool(rows.any()) else None
