"""GPTQ rounding of the (already transformed) weights."""

from __future__ import annotations

from torch import Tensor

from calib.quantizers import AnyWeight
from calib.recipe import Recipe
from calib.solvers import gptq


class GPTQ:
    """Observes the Gram matrix of every site; its statistics are moved through the folds, not collected again."""

    name = "gptq"

    def __init__(self, value: str = "") -> None:
        del value

    def quantize(self, weight: Tensor, gram: Tensor, spec: AnyWeight, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
        return gptq(weight, gram, spec, damp=recipe.damp)
