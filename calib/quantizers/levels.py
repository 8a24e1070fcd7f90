"""Grids of 2 to 16 levels below the affine ones: value = integer(code) x scale, no zero point.

``seq`` (ParetoQ, arXiv 2502.02631): k equal cells tile [-a, a], each stands for its midpoint ((2l + 1) / k - 1) a; for
k = 3 that is {-2/3, 0, 2/3} a. ``lsq`` (ParetoQ at 3 and 4 bits): a c, c in [-k/2, k/2 - 1]. ``binary`` (ParetoQ
elastic, TBT): +-a. Ternary {-a, 0, a}: ``tbt`` (ACL 2023), ``twn`` (arXiv 1605.04711), ``absmean`` (BitNet b1.58)
differ in how a is found. The stored scale is what multiplies the integers: a / k and odd integers for even seq, 2a/3
for its three levels, else a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calib.errors import InputError
from calib.quantizers.affine import grouped
from calib.quantizers.pack import pack, pack_trits, packed_width, trits_width, unpack, unpack_trits

Kind = Literal["seq", "lsq", "binary", "tbt", "twn", "absmean"]
ScaleRule = Literal["published", "mse"]
LEVELS: dict[str, tuple[int, ...]] = {
    "seq": (3, 4, 8, 16),
    "lsq": (4, 8, 16),
    "binary": (2,),
    "tbt": (3,),
    "twn": (3,),
    "absmean": (3,),
}
STATISTIC = ("tbt", "twn", "absmean")  # scales that are a statistic of the weights: nothing is searched


@dataclass(frozen=True, kw_only=True)
class Granules:
    """Scales per output row (``channel``) or per ``group_size`` inputs of it (``group``), kept in fp16."""

    granularity: Literal["channel", "group"] = "channel"
    group_size: int | None = None
    range: ScaleRule = "mse"
    symmetric = True  # no zero point
    scale_dtype = torch.float16
    scales = 1  # a granule

    def __post_init__(self) -> None:
        if self.granularity not in ("channel", "group") or (self.granularity == "group") != (
            self.group_size is not None
        ):
            raise InputError(
                f"granularity {self.granularity!r} with group_size {self.group_size}",
                "use channel, or group and a group_size",
            )
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size {self.group_size} is not positive", "use 32, 64 or 128")
        if self.range not in ("published", "mse"):
            raise InputError(f"low-bit grids know no range rule {self.range!r}", "use published or mse")

    def scale_shape(self, out: int, n: int) -> tuple[int, ...]:
        """Of the scales of a weight [out, n]."""
        return (out, self.scales) if self.group_size is None else (out, n // self.group_size, self.scales)

    def words(self, n: int) -> int:
        raise NotImplementedError

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits a weight of [out, n]: padded codes and scales."""
        out, n = shape
        return (32 * self.words(n) * out + 16 * math.prod(self.scale_shape(out, n))) / (out * n)


@dataclass(frozen=True, kw_only=True)
class LevelSpec(Granules):
    """One grid of ``levels`` values. range ``published``: scales as the paper sets them (seq, lsq: from the largest
    weight, which is an initial value for training); ``mse``: the least (weighted) squared error.
    """

    kind: Kind = "seq"
    levels: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in LEVELS:
            raise InputError(f"unknown grid {self.kind!r}", f"use {', '.join(LEVELS)}")
        if self.levels not in LEVELS[self.kind]:
            raise InputError(
                f"a {self.kind} grid has no {self.levels} levels",
                f"use {' or '.join(map(str, LEVELS[self.kind]))}",
            )
        if self.kind in STATISTIC and self.range == "mse":
            raise InputError(f"the scale of a {self.kind} grid is a statistic", "use range published, or seq with mse")

    integer = True

    @property
    def odd(self) -> bool:
        """True where the levels lie at odd multiples of the scale, without 0."""
        return self.levels == 2 or (self.kind == "seq" and self.levels % 2 == 0)

    @property
    def bits(self) -> float:
        """Of a stored code."""
        return 1.6 if self.levels == 3 else math.log2(self.levels)

    @property
    def qmin(self) -> int:
        return -(self.levels // 2)

    @property
    def qmax(self) -> int:
        return (self.levels - 1) // 2

    def with_(self, **changes: object) -> LevelSpec:
        return replace(self, **changes)  # type: ignore[arg-type]

    def integers(self, codes: Tensor) -> Tensor:
        """What the scale multiplies, int8."""
        return 2 * codes + 1 if self.odd else codes

    def encode(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Codes (int8, shape of weight) of the nearest levels; 0 goes to the positive one where there is no zero."""
        # a granule of zeros has scale 0: every code is then 0
        view, step = grouped(weight, self).float(), scale.float()
        units = view / step.masked_fill(step == 0, 1.0)
        codes = torch.floor(units / 2) if self.odd else units.round_()
        return codes.clamp_(self.qmin, self.qmax).to(torch.int8).reshape(weight.shape)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Values (fp32, shape of codes)."""
        return (grouped(self.integers(codes), self) * scale.float()).reshape(codes.shape)

    def words(self, n: int) -> int:
        """int32 words of a packed row of n codes."""
        return trits_width(n) if self.levels == 3 else packed_width(n, int(self.bits))

    def pack(self, codes: Tensor) -> Tensor:
        return pack_trits(codes) if self.levels == 3 else pack(codes, int(self.bits))

    def unpack(self, words: Tensor, n: int) -> Tensor:
        return unpack_trits(words, n) if self.levels == 3 else unpack(words, int(self.bits), n)
