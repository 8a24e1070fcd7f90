"""Flexible dual binarization (DB-LLM, arXiv 2402.11960): two planes of {0, 1}, levels {0, a1, a2, a1 + a2}.

With a2 < 0 < a1 + a2 < a1 the thresholds of the paper, b1 = H(w - (a1 + a2) / 2) and b2 = H(-(w - a1 b1 - a2 / 2)),
are the midpoints between neighbours: nearest-level assignment. The mirror image of the grid (both scales negated) is
as cheap, so each granule may have either sign.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.quantizers.affine import grouped
from calib.quantizers.levels import Granules
from calib.quantizers.pack import pack, packed_width, unpack


@dataclass(frozen=True, kw_only=True)
class DualBinarySpec(Granules):
    """Scales [..., 2] hold (a1, a2) of a granule; a code is b1 + 2 b2 - 2. range ``published``: a1 = max|w|, a2 =
    -max|w| / 2; ``mse``: alternating least squares, either sign.
    """

    kind: str = "dual-binary"
    integer = False
    scales = 2
    bits = 2

    def with_(self, **changes: object) -> DualBinarySpec:
        return replace(self, **changes)  # type: ignore[arg-type]

    def encode(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Codes (int8, shape of weight) of the nearest levels."""
        first, second = planes(grouped(weight, self).float(), *split(scale))
        return (first.to(torch.int8) + 2 * second.to(torch.int8) - 2).reshape(weight.shape)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Values (fp32, shape of codes): a1 b1 + a2 b2."""
        view, (a1, a2) = grouped(codes, self), split(scale)
        return ((view & 1) * a1 + ((view + 2) >> 1) * a2).reshape(codes.shape)

    def integers(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("two scales multiply a code's bits")

    def words(self, n: int) -> int:
        """int32 words of a packed row: the first plane's, then the second's."""
        return 2 * packed_width(n, 1)

    def pack(self, codes: Tensor) -> Tensor:
        return torch.cat([pack((codes & 1) - 1, 1), pack(codes >> 1, 1)], dim=1)

    def unpack(self, words: Tensor, n: int) -> Tensor:
        first, second = (unpack(plane, 1, n) for plane in words.chunk(2, dim=1))
        return second.mul_(2).add_(first).add_(1)


def split(scale: Tensor) -> tuple[Tensor, Tensor]:
    """(a1, a2) in fp32, each to broadcast with a grouped weight."""
    return scale[..., :1].float(), scale[..., 1:].float()


def planes(weight: Tensor, a1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """The two planes (bool) of a grouped weight."""
    sign = torch.where(a1 < 0, -1.0, 1.0)
    weight, a1, a2 = weight * sign, a1 * sign, a2 * sign
    first = weight >= (a1 + a2) / 2
    return first, weight - a1 * first <= a2 / 2
