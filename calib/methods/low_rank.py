"""Low-rank bases: in the place of a weight (``keep``), or beside a rounded one for its error (``rank``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calib.errors import InputError
from calib.nn import QuantLinear, SideBranch
from calib.recipe import Recipe
from calib.solvers import (
    COMPENSATIONS,
    TRUNCATIONS,
    Bases,
    InputStatistics,
    bases,
    choose_ranks,
    error_bases,
    evened,
    loftq,
    svd_llm_bases,
    uniform_ranks,
)

# Of the way to even ranks. Worth is known to first order and errors compound: the more is lost the more even ranks
# should be, and how much differs with the text. KL on calibration text of SmolLM2-135M, 0, 1/2, 3/4 and 1 of the way:
# at keep 0.5 of GSM8K 0.88, 1.06, 1.13 and 1.18, at 0.3 of it 2.57, 2.04, 2.01 and 2.12.
EVEN = (0.0, 0.5, 0.75, 1.0)


class LowRank:
    """``low_rank:VARIANT``. With ``keep`` or ``max_size`` on the recipe weights are truncated (whitened by default),
    without, the error of rounding is compensated (qera by default)."""

    name = "low_rank"

    def __init__(self, recipe: Recipe, value: str = "") -> None:
        self.truncates = recipe.truncates
        known = TRUNCATIONS if self.truncates else COMPENSATIONS
        self.variant = value or known[0]
        if self.variant not in known:
            what = "truncates" if self.truncates else "compensates (keep, or max_size, would truncate)"
            raise InputError(f"low_rank:{value} is none of what {what}", f"use {', '.join(known)}")
        if self.truncates and recipe.select == "global" and self.variant != "whitened":
            raise InputError(f"low_rank:{self.variant} does not know what a basis costs", "use select uniform")
        if self.variant == "loftq" and any(m.partition(":")[0] == "gptq" for m in recipe.methods):
            raise InputError("loftq rounds to nearest again and again, gptq rounds otherwise", "use low_rank:qera")
        self.selects = recipe.select != "uniform" and self.variant == "whitened"
        self.recipe = recipe

    def bases(self, weight: Tensor, statistics: InputStatistics) -> Bases:
        """All bases of weight [out, in] in the order in which they are kept."""
        if self.variant == "svd-llm":
            return svd_llm_bases(weight, statistics.gram)
        return bases(weight, statistics.metric(self.variant))

    @property
    def ways(self) -> tuple[float, ...]:
        """Of the way to even ranks. Where there are several, a trial on the model tells."""
        if not self.selects:
            return (1.0,)
        return EVEN if self.recipe.select == "auto" else (0.0,)

    def ranks(
        self,
        even: float,
        shapes: Sequence[tuple[int, int]],
        energies: Sequence[Tensor],
        worth: Sequence[float] | None,
        budget: float,
    ) -> list[int | None]:
        """Of every layer (out, in), for a budget of parameters; None: it stays dense. Factors that are rounded in
        groups get ranks of whole groups. energies: of the layers' bases, unless ranks are even; worth: of a unit of
        each layer's, None: one over what the layer has.
        """
        keep = budget / sum(out * n for out, n in shapes)
        if even == 1:
            ranks = uniform_ranks(shapes, keep)
        else:
            shares = worth or [1 / max(float(e.sum()), 1e-30) for e in energies]
            ranks = evened(shapes, choose_ranks(shapes, energies, shares, budget), keep, even)
        spec = self.recipe.scheme.weights
        group = (spec.group_size or 1) if self.recipe.scheme.rounds else 1
        return [None if rank is None else max(group, rank // group * group) for rank in ranks]

    def compensated(self, module: QuantLinear, weight: Tensor, statistics: InputStatistics) -> QuantLinear:
        """Give a rounded weight [out, in] (of transformed inputs) the side branch that makes up for its error."""
        if self.variant == "loftq":
            spec = module.weight_spec

            def again(target: Tensor) -> QuantLinear:
                return QuantLinear.from_float(target, module.bias, spec, module.input)

            target, found = loftq(weight, lambda w: again(w).dequantize(), self.recipe.rank)
            module = again(target)
        else:
            found = error_bases(self.variant, weight - module.dequantize(), statistics)
        b, a = found.factors(self.recipe.rank)
        bits = 8 if self.recipe.factors == "int8" else None
        module.side = SideBranch.of(b.float(), a.float(), bits, weight.dtype)
        return module

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> float:
        """What the side branch adds, bits a weight."""
        out, n = shape
        rank = min(self.recipe.rank, out, n)
        each = 8 if self.recipe.factors == "int8" else torch.finfo(dtype).bits
        scales = 64 if self.recipe.factors == "int8" else 0
        return rank * ((out + n) * each + scales) / (out * n)
