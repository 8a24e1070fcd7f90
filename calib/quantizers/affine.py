"""Uniform affine integer grids: ranges -> (scale, zero point) -> codes -> values.

Codes are signed and fit int8: symmetric grids are narrow, [-(2^(b-1)-1), 2^(b-1)-1] with step absmax /
(2^(b-1)-1); asymmetric grids use all 2^b codes, [-2^(b-1), 2^(b-1)-1], with an integer zero point. Every
range is widened to hold 0. One bit is for static inputs: codes -1 and 1 (0 is 1) of a symmetric grid, {0, a} or
{-a, 0} of an asymmetric one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from calib.errors import InputError
from calib.quantizers.pack import pack, packed_width, unpack

Granularity = Literal["tensor", "channel", "group", "token"]
RangeRule = Literal["minmax", "mse", "percentile"]
EPS = torch.finfo(torch.float32).eps
SMALLEST_SCALE = 2.0**-100  # below this a range is a point: its scale would overflow when inverted, so it becomes EPS


@dataclass(frozen=True)
class AffineSpec:
    """One affine integer format.

    granularity: ``tensor`` one scale; ``channel`` one per output row (weights); ``group`` one per
    ``group_size`` contiguous inputs; ``token`` one per row of activations. dynamic: ranges are taken from
    each input at run time. range: how a static range (or a weight's) is chosen; ``percentile`` is in percent
    of elements kept.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    dynamic: bool = False
    range: RangeRule = "minmax"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        one_bit = self.bits == 1 and self.granularity == "tensor" and not self.dynamic
        if not 2 <= self.bits <= 8 and not one_bit:
            raise InputError(f"affine int grids have 2 to 8 bits, got {self.bits}", "choose bits in 2..8")
        if (self.granularity == "group") != (self.group_size is not None):
            raise InputError(
                f"granularity {self.granularity!r} with group_size {self.group_size}",
                "give group_size with granularity 'group' and only there",
            )
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size {self.group_size} is not positive", "use 32, 64 or 128")
        if not 50.0 <= self.percentile <= 100.0:
            raise InputError(f"percentile {self.percentile} is outside 50..100", "use e.g. 99.9")

    @property
    def binary(self) -> bool:
        """Whether codes are signs."""
        return self.bits == 1 and self.symmetric

    @property
    def qmin(self) -> int:
        return -1 if self.binary else -(2 ** (self.bits - 1)) + int(self.symmetric)

    @property
    def qmax(self) -> int:
        return 1 if self.binary else int(2 ** (self.bits - 1)) - 1

    def with_(self, **changes: object) -> AffineSpec:
        return replace(self, **changes)  # type: ignore[arg-type]

    def snap(self, q: Tensor) -> Tensor:
        """Codes as numbers, in place, of q (fp32) in units of the scale, zero point added; NaN stays."""
        if self.binary:
            return q.copy_(torch.where(q < 0, -1.0, torch.where(q >= 0, 1.0, q)))
        return q.round_().clamp_(self.qmin, self.qmax)

    def stored(self, numbers: Tensor) -> Tensor:
        """int8 that hold codes."""
        return numbers.to(torch.int8)

    def numbers(self, codes: Tensor) -> Tensor:
        """Codes as numbers, fp32, from the int8 that hold them; a fresh tensor."""
        return codes.to(torch.float32, copy=True)

    # What a weight format has to offer, as LevelSpec and DualBinarySpec do; see ``WeightSpec``.
    integer = True  # values are integers times one scale a granule

    @property
    def scale_dtype(self) -> torch.dtype:
        """What a weight's scales are kept in. Those of groups are many: half as large, and exact in every export."""
        return torch.bfloat16 if self.granularity == "group" else torch.float32

    def scale_shape(self, out: int, n: int) -> tuple[int, ...]:
        """Of the scales of a weight [out, n]."""
        if self.granularity == "tensor":
            return (1,)
        return (out, 1) if self.group_size is None else (out, n // self.group_size, 1)

    def encode(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return encode(weight, scale, zero_point, self)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return decode(codes, scale, zero_point, self)

    def integers(self, codes: Tensor) -> Tensor:
        """What the scale of a symmetric grid multiplies, int8: the codes."""
        return codes

    def words(self, n: int) -> int:
        """int32 words of a packed row of n codes."""
        return packed_width(n, self.bits)

    def pack(self, codes: Tensor) -> Tensor:
        return pack(codes, self.bits)

    def unpack(self, words: Tensor, n: int) -> Tensor:
        return unpack(words, self.bits, n)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return bits_per_weight(shape, self)


class Granular(Protocol):
    """What says how far a scale reaches."""

    @property
    def granularity(self) -> str: ...
    @property
    def group_size(self) -> int | None: ...


def qparams(lo: Tensor, hi: Tensor, spec: AffineSpec) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) of the ranges [lo, hi], elementwise over any shape.

    A group's scale is one that bf16 holds. A range that is the point 0 gets scale EPS. NaN or infinity pass into
    the scale, so that a dynamic row that holds one comes out NaN; static ranges are checked where they are chosen
    (``weight_range``, ``tensor_range``).
    """
    lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
    if spec.symmetric:
        scale = _stored(torch.maximum(-lo, hi).div_(spec.qmax), spec)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    steps = spec.qmax - spec.qmin
    scale = _stored((hi - lo).div_(steps), spec)
    if spec.scale_dtype == torch.bfloat16:  # at 8 bits, rounded down, it may miss up to 1.4 steps of the range
        above = scale.bfloat16().view(torch.int16).add_(1).view(torch.bfloat16).float()
        scale = torch.where(hi - lo > scale * (steps + 0.5), above, scale)
    zero_point = torch.div(lo, scale).round_().neg_().add_(spec.qmin).clamp_(spec.qmin, spec.qmax)
    return scale, zero_point.nan_to_num_(0.0).to(torch.int32)


def _stored(scale: Tensor, spec: AffineSpec) -> Tensor:
    return scale.masked_fill_(scale < SMALLEST_SCALE, EPS).to(spec.scale_dtype).float()


def grouped(x: Tensor, spec: Granular) -> Tensor:
    """View x [..., n] so that its last dimension shares one scale: [..., n/g, g] for groups, else x."""
    if spec.granularity != "group":
        return x
    assert spec.group_size is not None
    if x.shape[-1] % spec.group_size:
        raise InputError(
            f"group size {spec.group_size} does not divide {x.shape[-1]} input channels",
            "choose a divisor, or exclude the layer",
        )
    return x.unflatten(-1, (-1, spec.group_size))


def minmax(x: Tensor, spec: AffineSpec) -> tuple[Tensor, Tensor]:
    """Extremes of x [..., n] at the spec's granularity, to broadcast with ``grouped(x)``; NaN propagates."""
    if spec.granularity == "tensor":
        lo, hi = torch.aminmax(x.reshape(-1))
        return lo, hi
    view = grouped(x, spec)  # amin and amax apart: aminmax over a dimension is 20 times slower on a CPU
    return view.amin(dim=-1, keepdim=True), view.amax(dim=-1, keepdim=True)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, spec: AffineSpec) -> Tensor:
    """Codes as numbers (fp32), shaped like ``grouped(x)``: the arithmetic all paths share. Always a fresh tensor."""
    q = torch.div(grouped(x, spec).float(), scale)
    if not spec.symmetric:
        q.add_(zero_point.to(q.dtype))  # before rounding, as compressed-tensors does: it decides ties
    return spec.snap(q)


def _values(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: AffineSpec) -> Tensor:
    """Values of codes as numbers (fp32), in place."""
    if not spec.symmetric:
        codes.sub_(zero_point.to(codes.dtype))
    return codes.mul_(scale)


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, spec: AffineSpec) -> Tensor:
    """Codes (int8, shape of x): round half to even, then clamp. The integer code of NaN is unspecified."""
    return spec.stored(_rounded(x, scale, zero_point, spec)).reshape(x.shape)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: AffineSpec) -> Tensor:
    """Values (fp32, shape of codes) of int8 codes."""
    return _values(spec.numbers(grouped(codes, spec)), scale, zero_point, spec).reshape(codes.shape)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: AffineSpec) -> Tensor:
    """decode(encode(x)) in x's dtype without the trip through int8 (same bits; NaN stays NaN)."""
    return _values(_rounded(x, scale, zero_point, spec), scale, zero_point, spec).reshape(x.shape).to(x.dtype)


def fake_quantize_dynamic(x: Tensor, spec: AffineSpec) -> Tensor:
    """Fake-quantize x with min-max ranges of its own, at the spec's granularity."""
    scale, zero_point = qparams(*minmax(x, spec), spec)
    return fake_quantize(x, scale, zero_point, spec)


def bits_per_weight(
    shape: tuple[int, int], spec: AffineSpec, scale_bits: int | None = None, zero_bits: int = 8
) -> float:
    """Stored bits per weight: codes padded to words, scales, zero points. scale_bits: None, ``spec.scale_dtype``'s."""
    out, n = shape
    scales = {"tensor": 1, "channel": out, "group": out * n // (spec.group_size or n), "token": out}[spec.granularity]
    each = (scale_bits or 8 * spec.scale_dtype.itemsize) + (0 if spec.symmetric else zero_bits)
    return (spec.words(n) * 32 / n if spec.bits < 8 else 8) + scales * each / (out * n)
