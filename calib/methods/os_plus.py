"""OS+: shift by the midpoint, scale by the threshold with the least output error."""

from __future__ import annotations

from calib.methods.base import ShiftScale, SiteView
from calib.recipe import Recipe
from calib.solvers import midpoint, search_exhaustive, search_fast


class OSPlus:
    """Observes channel extremes; solves eqs. 5, 8 and 9 of arXiv 2304.09145."""

    name = "os+"

    def __init__(self, value: str = "") -> None:
        del value

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        shift = midpoint(site.lo, site.hi) if recipe.shift and site.can_shift else None
        if not (recipe.scale and site.can_scale):
            return ShiftScale(shift)
        lo, hi = (site.lo, site.hi) if shift is None else (site.lo - shift, site.hi - shift)
        absmax = (-lo).maximum(hi)
        few, many = site.objective(shift)
        if recipe.search == "exhaustive":
            found = search_exhaustive(absmax, many)
        else:
            found = search_fast(absmax, few, many)
        detail = {
            "threshold": found.threshold,
            "loss": found.loss,
            "identity_loss": found.identity_loss,
            "curve": [list(point) for point in found.curve],
        }
        return ShiftScale(shift, found.scale if found.threshold < float("inf") else None, detail)
