"""One file a method: what it observes, its solver, its transform. No method knows another."""

from __future__ import annotations

from calib.methods.awq import AWQ
from calib.methods.base import ShiftScale, SiteMethod, SiteView, WeightMethod
from calib.methods.basel import Basel
from calib.methods.gptq import GPTQ
from calib.methods.hadamard import Hadamard
from calib.methods.low_rank import LowRank
from calib.methods.os_plus import OSPlus
from calib.methods.smoothquant import SmoothQuant
from calib.recipe import Recipe

__all__ = [
    "AWQ",
    "GPTQ",
    "Basel",
    "Hadamard",
    "LowRank",
    "OSPlus",
    "ShiftScale",
    "SiteMethod",
    "SiteView",
    "SmoothQuant",
    "WeightMethod",
    "basel_of",
    "low_rank_of",
    "resolve",
]


def resolve(recipe: Recipe) -> tuple[list[SiteMethod], GPTQ | None]:
    """The recipe's methods as objects: those that solve sites, in order, and the one that rounds weights."""
    given = dict(method.partition(":")[::2] for method in recipe.methods)
    name = "rotate" if "rotate" in given else "hadamard"
    rotation = Hadamard(name, given[name]) if name in given else None
    sites: list[SiteMethod] = []
    if "smoothquant" in given:
        sites.append(SmoothQuant(given["smoothquant"]))
    if "awq" in given:
        sites.append(AWQ())
    if "os+" in given:
        sites.append(OSPlus(given["os+"], rotation.block_for if rotation else None))
    elif rotation is not None:
        sites.append(rotation)
    return sites, next((GPTQ(name) for name in ("gptaq", "gptq") if name in given), None)


def low_rank_of(recipe: Recipe) -> LowRank | None:
    """The recipe's low-rank method, which works on weights after all sites are solved."""
    given = dict(method.partition(":")[::2] for method in recipe.methods)
    return LowRank(recipe, given["low_rank"]) if "low_rank" in given else None


def basel_of(recipe: Recipe) -> Basel | None:
    """The recipe's Basel, which trains the whole model in the place of all else."""
    given = dict(method.partition(":")[::2] for method in recipe.methods)
    return Basel(recipe, given["basel"]) if "basel" in given else None
