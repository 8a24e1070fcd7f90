"""SmoothQuant: scale every channel by a fixed power of its range."""

from __future__ import annotations

from calib.errors import InputError
from calib.methods.base import ShiftScale, SiteView
from calib.recipe import Recipe
from calib.solvers import smoothing_scale


class SmoothQuant:
    """``smoothquant:0.8`` sets alpha (0.5 by default). Norms' outputs, as published (arXiv 2211.10438);
    in fused form also inputs that no neighbour can scale (post-LN encoders)."""

    name = "smoothquant"

    def __init__(self, value: str = "") -> None:
        try:
            self.alpha = float(value or 0.5)
        except ValueError:
            raise InputError(f"smoothquant:{value} is not a number", "write e.g. smoothquant:0.8") from None
        if not 0.0 <= self.alpha <= 1.0:
            raise InputError(f"smoothquant alpha {self.alpha} is outside 0..1", "write e.g. smoothquant:0.8")

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        if site.kind not in ("norm", "input") or not site.can_scale:
            return ShiftScale()
        absmax = (-site.lo).maximum(site.hi)
        return ShiftScale(scale=smoothing_scale(absmax, site.weight_absmax, self.alpha), detail={"alpha": self.alpha})
