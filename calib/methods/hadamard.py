"""Online block Hadamard on inputs that no norm feeds (down_proj): the outlier is spread over its block."""

from __future__ import annotations

from calib.errors import InputError
from calib.nn import best_block, hadamard_matrix


class Hadamard:
    """``hadamard:128`` sets the block; by default the largest power of two up to 128 that divides the width."""

    name = "hadamard"
    kinds = ("updown", "fc")

    def __init__(self, value: str = "") -> None:
        if value and not value.isdigit():
            raise InputError(f"hadamard:{value} is not a block size", "write e.g. hadamard:128")
        self.block = int(value or 0)
        if self.block:
            hadamard_matrix(self.block)

    def block_for(self, width: int) -> int:
        """The block for inputs of this width; 1 (no rotation) where an odd width has none."""
        if self.block and width % self.block:
            raise InputError(f"hadamard:{self.block} does not divide {width} inputs", "choose a divisor, or none")
        return self.block or best_block(width)
