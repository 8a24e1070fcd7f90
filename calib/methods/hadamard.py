"""Block Hadamard rotations of linears' inputs: an outlier is spread over its block."""

from __future__ import annotations

from calib.errors import InputError
from calib.methods.base import ShiftScale, SiteView
from calib.nn import best_block, hadamard_matrix
from calib.recipe import Recipe


class Hadamard:
    """``hadamard`` turns inputs that no norm feeds (down_proj, fc2), ``rotate`` every input.

    ``hadamard:128`` sets the block; by default the largest power of two up to 128 that divides the width. Alone it
    rotates every such site; with os+ beside it, os+ decides site by site which costs less. After a norm a rotation runs
    online, as at down_proj; between value and output projection it is folded into both where the block divides a head.
    """

    name = "hadamard"

    def __init__(self, name: str, value: str = "") -> None:
        if value and not (value.isascii() and value.isdigit() and int(value)):
            raise InputError(f"{name}:{value} is not a block size", f"write e.g. {name}:128")
        self.name, self.block = name, int(value or 0)
        if self.block:
            hadamard_matrix(self.block)

    def block_for(self, width: int, largest: int = 128) -> int:
        """The block for inputs of this width; 1 (no rotation) where an odd width has none."""
        if self.block and width % self.block:
            raise InputError(f"{self.name}:{self.block} does not divide {width} inputs", "choose a divisor, or none")
        return self.block or best_block(width, largest)

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        block = self.block_for(len(site.lo), site.largest_block) if site.can_rotate else 1
        return ShiftScale(hadamard=block, detail={"hadamard": block} if block > 1 else {})
