"""One file a method: what it observes, its solver, its transform. No method knows another."""

from __future__ import annotations

from calib.methods.base import ShiftScale, SiteMethod, SiteView, WeightMethod
from calib.methods.gptq import GPTQ
from calib.methods.hadamard import Hadamard
from calib.methods.os_plus import OSPlus
from calib.methods.smoothquant import SmoothQuant
from calib.recipe import Recipe

SITE_METHODS: dict[str, type[OSPlus] | type[SmoothQuant]] = {"os+": OSPlus, "smoothquant": SmoothQuant}

__all__ = ["GPTQ", "Hadamard", "OSPlus", "ShiftScale", "SiteMethod", "SiteView", "SmoothQuant", "WeightMethod", "resolve"]


def resolve(recipe: Recipe) -> tuple[list[SiteMethod], GPTQ | None, Hadamard | None]:
    """The recipe's methods as objects: those that solve sites, the one that rounds weights, the rotation."""
    sites: list[SiteMethod] = []
    weights: GPTQ | None = None
    rotation: Hadamard | None = None
    for method in recipe.methods:
        name, _, value = method.partition(":")
        if name in SITE_METHODS:
            sites.append(SITE_METHODS[name](value))
        elif name == "gptq":
            weights = GPTQ(value)
        elif name == "hadamard":
            rotation = Hadamard(value)
    return sites, weights, rotation
