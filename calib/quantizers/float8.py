"""float8 e4m3 (OCP 8-bit floating point, ``torch.float8_e4m3fn``): the range decides a scale, the grid is a float's.

Four bits of exponent and three of mantissa: normal numbers from 2^-6 to 448, multiples of 2^-9 below; no infinity. The
step grows with the value, so that a channel ten times the others costs them no resolution until it costs them range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calib.errors import InputError
from calib.quantizers.affine import AffineSpec

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448
SMALLEST_NORMAL_STEP = 2.0**-9  # of the numbers in [2^-6, 2^-5), and of all below
EXPONENT = 0x7F800000  # of fp32


@dataclass(frozen=True)
class Float8Spec(AffineSpec):
    """A symmetric range whose largest value becomes 448; codes are the bits of e4m3 in an int8.

    Scales are those that compressed-tensors' ``float-quantized`` takes: absmax / 448, fp32.
    """

    kind: Literal["float8"] = "float8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 8 or not self.symmetric:
            raise InputError("a float8 grid has 8 bits and no zero point", "choose w8a8 or the like to change them")

    integer = False

    @property
    def qmin(self) -> int:
        return -LARGEST

    @property
    def qmax(self) -> int:
        return LARGEST

    def snap(self, q: Tensor) -> Tensor:
        """Numbers of e4m3, in place, nearest to q (fp32), ties to even; what is beyond is the largest, NaN stays.

        The bits of a cast there and back, at a fifth of its time on a CPU.
        """
        q.clamp_(-LARGEST, LARGEST)
        step = (q.view(torch.int32) & EXPONENT).view(torch.float32).mul_(0.125).clamp_(min=SMALLEST_NORMAL_STEP)
        return q.div_(step).round_().mul_(step)

    def stored(self, numbers: Tensor) -> Tensor:
        return numbers.to(FLOAT8).view(torch.int8)

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.view(FLOAT8).to(torch.float32)

    def integers(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("codes of float8 are no integers")
