"""What the block loop puts in the place of a linear that low_rank truncates or compensates."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from calib.engine.state import SiteState
from calib.errors import InputError
from calib.methods import LowRank, WeightMethod
from calib.model import Plan
from calib.nn import ActivationQuantizer, LowRankLinear, QuantLinear
from calib.observers import Moments
from calib.quantizers import qparams, tensor_range
from calib.recipe import Recipe
from calib.solvers import InputStatistics

STAYS_DENSE = "stays dense: factors of its rank are no smaller"


@dataclass(frozen=True, eq=False)
class LowRankWork:
    """The method and, where it truncates, each planned linear's rank (None: it stays dense) and Fisher information."""

    method: LowRank
    ranks: Mapping[str, int | None] = field(default_factory=dict)
    fisher: Mapping[str, Tensor] = field(default_factory=dict)

    def rank(self, name: str) -> int | None:
        return self.ranks.get(name)

    def factored(
        self,
        name: str,
        linear: nn.Linear,
        state: SiteState,
        moments: Moments,
        quantizer: ActivationQuantizer,
        rounding: WeightMethod | None,
    ) -> tuple[LowRankLinear, dict[str, Tensor]]:
        """The linear's first bases as two linears, rounded as the scheme says; what was rounded, by attribute."""
        recipe, rank = self.method.recipe, self.ranks[name]
        assert rank is not None
        known = replace(statistics(state, moments), fisher=self.fisher.get(name))
        b, a = self.method.bases(linear.weight.detach(), known).factors(rank)
        dtype, bias = linear.weight.dtype, None if linear.bias is None else linear.bias.detach()
        if not recipe.scheme.rounds:
            return LowRankLinear.of(b, a, bias, dtype), {}
        gram = known.gram.double()
        inner = a @ gram @ a.T
        down = _rounded(a.to(dtype), None, copy.deepcopy(quantizer), gram, recipe, rounding)
        up = _rounded(b.to(dtype), bias, _between(a, state, recipe), inner, recipe, rounding)
        return LowRankLinear(down, up), {"down": a.to(dtype), "up": b.to(dtype)}

    def stored_bits(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> float:
        """Bits that both factors take, a weight of the whole."""
        scheme, (out, n) = self.method.recipe.scheme, shape
        parts = ((rank, n), (out, rank))
        each = [scheme.weights.bits_per_weight(p) if scheme.rounds else torch.finfo(dtype).bits for p in parts]
        return sum(bits * rank * size for bits, size in zip(each, (n, out), strict=True)) / (out * n)

    def compensated(self, module: QuantLinear, weight: Tensor, state: SiteState, moments: Moments) -> QuantLinear:
        """The rounded linear with its side branch."""
        return self.method.compensated(module, weight, statistics(state, moments))


def budget_of(model: nn.Module, plan: Plan, recipe: Recipe) -> float:
    """How many parameters the planned linears may keep together. InputError where max_size leaves none."""
    entries = [plan.entries[name] for name in plan.quantized()]
    planned = sum(e.shape[0] * e.shape[1] for e in entries)
    if recipe.max_size is None:
        assert recipe.keep is not None
        return recipe.keep * planned
    owners = {id(p): p for p in model.parameters()}.values()
    moved = [parameter for e in entries for parameter in [model.get_submodule(e.name).weight]]
    weights = sum(p.numel() * p.element_size() for p in moved if isinstance(p, Tensor))
    fixed = sum(p.numel() * p.element_size() for p in owners) - weights
    bits = sum(e.shape[0] * e.shape[1] * e.bits for e in entries)
    left = (recipe.max_size - fixed) * 8
    if left <= 0:
        raise InputError(f"what is not truncated takes {fixed} bytes, and max_size is {recipe.max_size}", "allow more")
    return min(1.0, left / bits) * planned


def statistics(state: SiteState, moments: Moments) -> InputStatistics:
    """Of the transformed input; E|x| is that of the kept rows."""
    assert moments.gram is not None
    return InputStatistics(moments.gram / max(moments.count, 1), state.sample.rows.abs().mean(0))


def _rounded(
    weight: Tensor,
    bias: Tensor | None,
    quantizer: ActivationQuantizer,
    gram: Tensor,
    recipe: Recipe,
    rounding: WeightMethod | None,
) -> QuantLinear:
    spec, solved = recipe.scheme.weights, {}
    if rounding is not None:
        codes, scale, zero = rounding.quantize(weight, gram.float(), spec, recipe)
        solved = {"codes": codes.contiguous(), "scale": scale, "zero_point": zero}
    return QuantLinear.from_float(weight, bias, spec, quantizer, importance=gram.diagonal().float(), **solved)


def _between(a: Tensor, state: SiteState, recipe: Recipe) -> ActivationQuantizer:
    """The quantizer of A x; a static range is that of the kept rows, widened by what they missed of the input's."""
    spec = recipe.scheme.inputs
    module = ActivationQuantizer(spec, len(a))
    if spec is None or spec.dynamic:
        return module
    rows = state.sample.rows @ a.to(state.sample.rows.dtype).T
    missed = (state.range.absmax.amax() / state.sample.rows.abs().amax().clamp(min=1e-30)).clamp(min=1)
    lo, hi = torch.aminmax(rows)
    scale, zero_point = qparams(*tensor_range(rows, lo * missed, hi * missed, spec), spec)
    module.scale, module.zero_point = scale.reshape(1), zero_point.reshape(1)
    return module
