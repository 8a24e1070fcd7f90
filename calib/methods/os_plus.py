"""OS+: shift by the midpoint, scale by the threshold with the least output error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calib.errors import InputError
from calib.methods.base import ShiftScale, SiteView
from calib.recipe import Recipe
from calib.solvers import midpoint, rank_coarse, search_exhaustive, search_fast


class OSPlus:
    """Observes channel extremes; solves eqs. 5, 8 and 9 of arXiv 2304.09145.

    rotation: the Hadamard block for a width and a largest block, where the recipe offers one: a site that can be
    rotated is ranked both ways and keeps the cheaper.
    """

    name = "os+"

    def __init__(self, value: str = "", rotation: Callable[[int, int], int] | None = None) -> None:
        if value:
            raise InputError(f"os+ takes no value, got {value!r}", "set its options on the recipe")
        self.rotation = rotation

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale:
        """(z, s), perhaps with a rotation, of one site: the cheapest variant that recipe and site allow.

        ``shift="auto"`` tries z and none: after GELU, say, a shift moves the many values near 0 off the grid's exact
        zero and costs more than it gives.
        """
        shift = midpoint(site.lo, site.hi) if recipe.shift and site.can_shift else None
        block = 1
        if self.rotation is not None and site.can_rotate:
            block = self.rotation(len(site.lo), site.largest_block)
        variants = [_Variant(site, shift)]
        if shift is not None and recipe.shift == "auto":
            variants.append(_Variant(site, None))
        if block > 1:
            variants.append(_Variant(site, None, block))
            if shift is not None:
                variants.append(_Variant(site, shift, block))
        scales = bool(recipe.scale) and site.can_scale
        if not scales:
            losses = [v.many(torch.ones_like(v.absmax)) for v in variants]
            best = min(range(len(variants)), key=lambda i: losses[i])
            found = variants[best]
            fixed = {"loss": losses[best], "identity_loss": losses[best]}
            return ShiftScale(found.shift, None, found.hadamard, fixed | _variant_losses(variants, losses))
        if recipe.search == "exhaustive":
            searches = [search_exhaustive(v.absmax, v.many) for v in variants]
            losses = [search.loss for search in searches]
            best = min(range(len(variants)), key=lambda i: losses[i])
            search = searches[best]
        else:  # choose the variant on few rows, then search it alone
            coarse = [rank_coarse(v.absmax, v.few) for v in variants]
            losses = [min(loss for _, loss in points) for points in coarse]
            best = min(range(len(variants)), key=lambda i: losses[i])
            found = variants[best]
            search = search_fast(found.absmax, found.few, found.many, coarse[best], keep=site.keep, slack=site.noise)
        detail: dict[str, Any] = {
            "threshold": search.threshold,
            "loss": search.loss,
            "identity_loss": search.identity_loss,
            "curve": [list(point) for point in search.curve],
        }
        scale = search.scale if search.threshold < float("inf") else None
        found = variants[best]
        return ShiftScale(found.shift, scale, found.hadamard, detail | _variant_losses(variants, losses))


class _Variant:
    """One way to treat a site: shifted or not, rotated or not."""

    def __init__(self, site: SiteView, shift: Tensor | None, hadamard: int = 1) -> None:
        self.shift, self.hadamard = shift, hadamard
        lo, hi = (site.lo, site.hi) if shift is None else (site.lo - shift, site.hi - shift)
        self.absmax = (-lo).maximum(hi)
        self.few, self.many = site.objective(shift, hadamard)

    @property
    def name(self) -> str:
        shifted = "plain" if self.shift is None else "shifted"
        return shifted if self.hadamard == 1 else f"{shifted}, rotated" if self.shift is not None else "rotated"


def _variant_losses(variants: list[_Variant], losses: list[float]) -> dict[str, Any]:
    """What the variants cost, where there was a choice."""
    if len(variants) == 1:
        return {}
    return {"variants": {variant.name: loss for variant, loss in zip(variants, losses, strict=True)}}
