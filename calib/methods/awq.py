"""AWQ: scale by a searched power of the channels' mean magnitude."""

from __future__ import annotations

from calib.methods.base import ShiftScale, SiteView
from calib.recipe import Recipe
from calib.solvers import search_power


class AWQ:
    """Observes the row sample; solves eqs. 4 and 5 of arXiv 2306.00978 with the site's own objective."""

    name = "awq"

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        if not site.can_scale:
            return ShiftScale()
        found = search_power(site.mean_abs, *site.objective(None, 1))
        power = 0.0 if found.threshold == float("inf") else found.threshold
        detail = {"power": power, "loss": found.loss, "identity_loss": found.identity_loss, "curve": found.curve}
        return ShiftScale(scale=found.scale if power else None, detail=detail)
