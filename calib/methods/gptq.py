"""GPTQ rounding of the (already transformed) weights."""

from __future__ import annotations

from torch import Tensor

from calib.quantizers import AnyWeight
from calib.recipe import Recipe
from calib.solvers import Pairs, gptq


class GPTQ:
    """``gptq`` observes the Gram matrix of every site; its statistics are moved through the folds, not collected again.

    ``gptaq`` (paired) rounds against what the quantized model feeds each linear and what the float model would have:
    a block's sites are then observed once more, one after the other, each behind those quantized before it.
    """

    def __init__(self, name: str = "gptq") -> None:
        self.name, self.paired = name, name == "gptaq"

    def quantize(
        self, weight: Tensor, gram: Tensor, spec: AnyWeight, recipe: Recipe, pairs: Pairs | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return gptq(weight, gram, spec, damp=recipe.damp, pairs=pairs)
