"""Online block Hadamard on inputs that no norm feeds (down_proj): the outlier is spread over its block."""

from __future__ import annotations

from calib.errors import InputError
from calib.methods.base import ShiftScale, SiteView
from calib.nn import best_block, hadamard_matrix
from calib.recipe import Recipe


class Hadamard:
    """``hadamard:128`` sets the block; by default the largest power of two up to 128 that divides the width.

    Alone it rotates every site that can be; with os+ beside it, os+ decides site by site which costs less.
    """

    name = "hadamard"

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

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        block = self.block_for(len(site.lo)) if site.can_rotate else 1
        return ShiftScale(hadamard=block, detail={"hadamard": block} if block > 1 else {})
