"""Codes of a layer's input, made once for all layers that take the same input on the same grid: q, k, v; gate, up."""

from __future__ import annotations

import hashlib
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.nn.activation import ActivationQuantizer

BLOCK = 1 << 19  # activations quantized at a time: larger temporaries page-fault on every call, up to 5x


class Codes:
    """Rows [M, in] on a grid. scale, zero_point: of the grid. outside: bool [M], rows that need float, None: none."""

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, outside: Tensor | None) -> None:
        self.scale, self.zero_point, self.outside = scale, zero_point, outside
        self._codes, self._flipped = codes, False

    @property
    def rows(self) -> int:
        return len(self._codes)

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
            self._codes.view(torch.uint8).bitwise_xor_(128)
            self._flipped = flipped
        return self._codes


def fingerprint(quantizer: ActivationQuantizer) -> bytes:
    """Equal of quantizers that give equal codes: grid, transform and their values."""
    found = hashlib.sha256(repr(quantizer.extra_repr()).encode())
    for name in ("scale", "zero_point", "shift", "rescale"):
        buffer = getattr(quantizer, name)
        found.update(b"-" if buffer is None else buffer.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.digest()


@dataclass
class _Kept:
    """The last codes a thread made. The input is not kept alive by them, nor they beyond it."""

    of: weakref.ref[Tensor]
    version: int
    key: bytes
    codes: Codes


_last = threading.local()


def codes_of(quantizer: ActivationQuantizer, key: bytes, x: Tensor) -> Codes:
    """Codes of x [..., in], as rows. key: the quantizer's fingerprint.

    Taken from the call before where it had this very tensor, unchanged, and an equal quantizer. Tensors made in
    inference mode do not tell whether they changed: theirs are always made anew.
    """
    kept: _Kept | None = getattr(_last, "kept", None)
    if x.is_inference():
        return quantized(quantizer, x.reshape(-1, x.shape[-1]))
    if kept is not None and kept.of() is x and kept.version == x._version and kept.key == key:
        return kept.codes
    codes = quantized(quantizer, x.reshape(-1, x.shape[-1]))
    _last.kept = _Kept(weakref.ref(x, _forget), x._version, key, codes)
    return codes


def _forget(of: weakref.ref[Tensor]) -> None:
    kept: _Kept | None = getattr(_last, "kept", None)
    if kept is not None and kept.of is of:
        _last.kept = None


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
