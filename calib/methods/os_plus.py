"""OS+: shift by the midpoint, scale by the threshold with the least output error."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.methods.base import ShiftScale, SiteView
from calib.recipe import Recipe
from calib.solvers import midpoint, search_exhaustive, search_fast


class OSPlus:
    """Observes channel extremes; solves eqs. 5, 8 and 9 of arXiv 2304.09145."""

    name = "os+"

    def __init__(self, value: str = "") -> None:
        del value

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        """(z, s) of one site. ``shift="auto"`` keeps z only where it lowers the objective: after GELU, say, it moves the
        many values near 0 off the grid's exact zero and costs more than it gives."""
        z = midpoint(site.lo, site.hi) if recipe.shift and site.can_shift else None
        found = self._scale(site, recipe, z)
        if z is not None and recipe.shift == "auto":
            plain = self._scale(site, recipe, None)
            shifted_loss, plain_loss = found.detail["loss"], plain.detail["loss"]
            found = found if shifted_loss <= plain_loss else plain
            found.detail |= {"loss_with_shift": shifted_loss, "loss_without_shift": plain_loss}
        return found

    def _scale(self, site: SiteView, recipe: Recipe, shift: Tensor | None) -> ShiftScale:
        lo, hi = (site.lo, site.hi) if shift is None else (site.lo - shift, site.hi - shift)
        absmax = (-lo).maximum(hi)
        few, many = site.objective(shift)
        if not (recipe.scale and site.can_scale):
            loss = many(torch.ones_like(lo))
            return ShiftScale(shift, None, {"loss": loss, "identity_loss": loss})
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
        return ShiftScale(shift, search.scale if search.threshold < float("inf") else None, detail)
