"""OS+: shift by the midpoint, scale by the threshold with the least output error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calib.errors import InputError
from calib.methods.base import ShiftScale, SiteView
from calib.recipe import Recipe
from calib.solvers import midpoint, search_exhaustive, search_fast


class OSPlus:
    """Observes channel extremes; solves eqs. 5, 8 and 9 of arXiv 2304.09145.

    rotation: the Hadamard block for a width, where the recipe offers one; a site that can be rotated is searched both
    ways and keeps the cheaper.
    """

    name = "os+"

    def __init__(self, value: str = "", rotation: Callable[[int], int] | None = None) -> None:
        if value:
            raise InputError(f"os+ takes no value, got {value!r}", "set its options on the recipe")
        self.rotation = rotation

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        """(z, s) of one site. ``shift="auto"`` keeps z only where it lowers the objective: after GELU, say, it moves the
        many values near 0 off the grid's exact zero and costs more than it gives."""
        z = midpoint(site.lo, site.hi) if recipe.shift and site.can_shift else None
        found = self._scale(site, recipe, z)
        if z is not None and recipe.shift == "auto":
            plain = self._scale(site, recipe, None)
            losses = {"loss_with_shift": found.detail["loss"], "loss_without_shift": plain.detail["loss"]}
            found = found if losses["loss_with_shift"] <= losses["loss_without_shift"] else plain
            found.detail |= losses
        block = self.rotation(len(site.lo)) if self.rotation is not None and site.can_rotate else 1
        if block > 1:
            rotated = self._scale(site, recipe, None, block)
            losses = {"loss_rotated": rotated.detail["loss"], "loss_unrotated": found.detail["loss"]}
            found = rotated if losses["loss_rotated"] < losses["loss_unrotated"] else found
            found.detail |= losses | {"hadamard": found.hadamard}
        return found

    def _scale(self, site: SiteView, recipe: Recipe, shift: Tensor | None, hadamard: int = 1) -> ShiftScale:
        lo, hi = (site.lo, site.hi) if shift is None else (site.lo - shift, site.hi - shift)
        absmax = (-lo).maximum(hi)
        few, many = site.objective(shift, hadamard)
        if not (recipe.scale and site.can_scale):
            loss = many(torch.ones_like(lo))
            return ShiftScale(shift, None, hadamard, {"loss": loss, "identity_loss": loss})
        if recipe.search == "exhaustive":
            search = search_exhaustive(absmax, many)
        else:
            search = search_fast(absmax, few, many)
        detail = {
            "threshold": search.threshold,
            "loss": search.loss,
            "identity_loss": search.identity_loss,
            "curve": [list(point) for point in search.curve],
        }
        return ShiftScale(shift, search.scale if search.threshold < float("inf") else None, hadamard, detail)
