"""Block reconstruction: learn how a block is rounded, by the error of its output.

Signed gradient descent on rounding offsets and on the scales' factors, as in AutoRound (arXiv 2309.05516), from any
start: a weight that GPTQ rounded begins where its codes are, so the start is what the solver found, not round to
nearest. Static input scales and OS+'s shift and scale (arXiv 2304.09145) are learned in the same way, from the values
that were solved for. Kept only where the error on windows held fixed falls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.errors import InputError
from calib.nn import ActivationQuantizer, CalledAsWeight, QuantLinear
from calib.quantizers import AffineSpec, grouped, straight

LEARN = ("rounding", "clipping")  # unless more is asked for
HOPELESS = 1.3  # errors at first rise with the rates: by this much at half of the steps they have not come back
STEP_TOKENS = 512  # that a step sees at least: the signs of fewer are noise (sentences of 25 tokens, two a batch)
INSIDE = 0.49  # how far from its code a weight may lie at the start
FACTORS = (0.7, 1.2)  # of a scale
# Of signed steps, whose rates fall to 0: a parameter moves by half of this at most. A tenth of AutoRound's for rounding
# and clipping: the start is a solver's, and large steps leave it. A scale's is smaller: many of GPTQ's codes lie at
# the edge of their cell, and a channel that moves by a percent rounds them back. A shift moves in steps of the grid.
OFFSET_RATE, FACTOR_RATE, INPUT_RATE, SCALE_RATE, SHIFT_RATE = 0.1, 0.03, 0.1, 0.01, 2.0
Fold = Callable[[Tensor | None, Tensor | None], None]


@dataclass(frozen=True)
class FoldableSite:
    """Linears (paths) whose producer takes s of each input channel through ``fold``, and z with takes_shift; else the
    linears' own inputs keep z, where they subtract a shift already."""

    paths: tuple[str, ...]
    fold: Fold | None = None
    takes_shift: bool = False


class LearnedSite(nn.Module):
    """What the linears of a site share: shift z and scale s = exp(l) [n] of their input, the factor [1] of its grid."""

    def __init__(self, quantizer: ActivationQuantizer, site: FoldableSite, learn: Collection[str]) -> None:
        super().__init__()
        self.quantizer, self.site, n = quantizer, site, quantizer.features
        static = quantizer.scale is not None and not quantizer.watches_rows
        folds = site.fold is not None and quantizer.rescale is None and quantizer.hadamard == 1
        shifts = site.takes_shift or quantizer.shift is not None

        def parameter(start: Tensor, learned: bool) -> nn.Parameter | None:
            return nn.Parameter(start) if learned else None

        self.factor = parameter(torch.ones(1), "inputs" in learn and static)
        self.shift = parameter(torch.zeros(n), "shift" in learn and folds and shifts and static)
        self.log_scale = parameter(torch.zeros(n), "scale" in learn and folds)

    @property
    def learns(self) -> set[str]:
        parts = {"inputs": self.factor, "shift": self.shift, "scale": self.log_scale}
        return {name for name, parameter in parts.items() if parameter is not None}

    @property
    def scale(self) -> Tensor | None:
        return None if self.log_scale is None else self.log_scale.exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed input, as it is and on its grid."""
        moved = self.quantizer.transformed(x)
        if self.shift is not None:
            moved = moved - self.shift
        if self.scale is not None:
            moved = moved / self.scale
        return moved, _on_grid(self.quantizer, moved, self.factor)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        steps = 1.0 if self.quantizer.scale is None else float(self.quantizer.scale)
        _step(self.factor, INPUT_RATE * rate, FACTORS)
        _step(self.log_scale, SCALE_RATE * rate)
        _step(self.shift, SHIFT_RATE * steps * rate)

    def moved(self, shift: Tensor | None) -> Tensor | None:
        """What a linear's input subtracts from now on, that subtracted ``shift``."""
        if shift is not None and self.shift is not None and not self.site.takes_shift:
            shift = shift + self.shift.detach()
        return shift if shift is None or self.scale is None else shift / self.scale.detach()

    @torch.no_grad()
    def settle(self) -> bool:
        """Fold what was learned into the producer; whether there was anything."""
        if self.site.fold is None or (self.shift is None and self.log_scale is None):
            return False
        self.site.fold(None if self.shift is None else self.shift.detach(), self.scale)
        return True


class LearnedLinear(CalledAsWeight, nn.Module):
    """Stands in for a QuantLinear while its codes are learned; straight-through gradients.

    weight [m, n] float, of transformed input. offset v [m, n] in [-0.5, 0.5] and factor f (shaped like the scale) give
    codes round(u / f + v), u the weight over its scale, moved where need be until it rounds to the code it has.
    """

    def __init__(self, module: QuantLinear, weight: Tensor, site: LearnedSite, learn: Collection[str] = LEARN) -> None:
        super().__init__()
        spec = module.weight_spec
        if not isinstance(spec, AffineSpec) or not spec.integer:
            kind = getattr(spec, "kind", "float8")
            raise InputError(f"learned rounding is for affine integers, not {kind}", "leave out refine")
        self.module, self.spec, self.shape, self.site, self.learn = module, spec, weight.shape, site, learn
        self.weight_float = weight
        scale, zero = module.weight_scale, module.weight_zero_point
        self.scale = scale.float()
        self.zero = torch.zeros((), dtype=torch.float32) if zero is None else zero.float()
        codes = grouped(module.codes(), spec).float() - self.zero
        found = grouped(weight.float(), spec) / self.scale
        self.start = codes + (found - codes).clamp_(-INSIDE, INSIDE)
        self.offset = nn.Parameter(torch.zeros_like(self.start))
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def _codes(self) -> Tensor:
        scale = self.site.scale
        start = self.start if scale is None else self.start * grouped(scale, self.spec)
        moved = start / self.factor + self.offset + self.zero
        rounded = moved + (moved.round() - moved).detach()
        return rounded.clamp(self.spec.qmin, self.spec.qmax)

    def _scale(self) -> Tensor:
        """What will be stored."""
        scale = self.scale * self.factor
        return straight.standing(scale, scale.detach().to(self.spec.scale_dtype).float())

    def _bias(self) -> Tensor | None:
        shift, bias = self.site.shift, self.module.bias
        if shift is None:
            return bias
        added = self.weight_float.float() @ shift
        return added if bias is None else bias + added

    def forward(self, x: Tensor) -> Tensor:
        weight = (self._codes() - self.zero) * self._scale()
        moved, taken = self.site(x)
        y = F.linear(taken, weight.view(self.shape), self._bias())
        return y if self.module.side is None else y + self.module.side(moved)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One signed step. rate: from 1 / steps to 0 over a run."""
        if "rounding" in self.learn:
            _step(self.offset, OFFSET_RATE * rate, (-0.5, 0.5))
        if "clipping" in self.learn:
            _step(self.factor, FACTOR_RATE * rate, FACTORS)

    @torch.no_grad()
    def learned(self) -> QuantLinear:
        """The module, with the codes, scales and bias that were learned."""
        module, factor = self.module, self.site.factor
        module.set_codes(self._codes().to(torch.int8).view(self.shape), self._scale(), self.zero)
        if self.site.shift is not None:
            module.bias = self._bias()
        module.input.shift = self.site.moved(module.input.shift)
        if factor is not None and module.input.scale is not None:
            module.input.scale = module.input.scale * factor.detach()
        return module


def _step(parameter: nn.Parameter | None, length: float, span: tuple[float, float] | None = None) -> None:
    if parameter is None or parameter.grad is None:  # an expert that no token reached has none
        return
    parameter.sub_(parameter.grad.sign_(), alpha=length)
    if span is not None:
        parameter.clamp_(*span)
    parameter.grad = None


def _on_grid(quantizer: ActivationQuantizer, moved: Tensor, factor: Tensor | None) -> Tensor:
    """The input grid on the transformed input; gradients pass where a static range does not clip."""
    if quantizer.spec is None:
        return moved
    if factor is not None:
        assert quantizer.scale is not None and quantizer.zero_point is not None
        return straight.affine(moved, quantizer.scale * factor, quantizer.zero_point, quantizer.spec)
    with torch.no_grad():
        got = quantizer.on_grid(moved)
    if quantizer.scale is None:
        return moved + (got - moved).detach()
    inside = (moved - got).detach().abs() <= quantizer.scale
    return torch.where(inside, moved, got) + torch.where(inside, got - moved, 0.0).detach()


@dataclass(frozen=True)
class Reconstruction:
    """before, after: the block's mean squared output error on the windows held fixed; taken: whether it fell; steps:
    that were made.
    missing: what was to be learned, and no site has."""

    before: float
    after: float
    taken: bool
    steps: int
    missing: tuple[str, ...]


def reconstruct(
    block: nn.Module,
    floats: Mapping[str, Tensor],
    run: Callable[[int], Tensor],
    target: Callable[[int], Tensor],
    masks: Sequence[Tensor | None],
    steps: int,
    seed: int,
    held: int = 2,
    learn: Collection[str] = LEARN,
    sites: Sequence[FoldableSite] = (),
) -> Reconstruction:
    """Learn how the block's QuantLinears named in ``floats`` (their weights, [m, n]) are rounded.

    run(i): the block's output on batch i; target(i): what it should be. masks[i]: which tokens count. Every step takes
    one batch, or several until it has seen STEP_TOKENS; rates fall linearly to 0. held: how many of the first batches
    judge start, middle (where an error HOPELESS times the start's ends it) and end, a quarter of all at most; they are
    not learned from where there are four. learn: of rounding, clipping (the weights' scales), inputs
    (static scales), scale and shift (OS+'s, of sites that fold). Linears of a site share what is learned of its input.
    """
    start = {path: module for path in floats if isinstance(module := block.get_submodule(path), QuantLinear)}
    held = min(held, max(1, len(masks) // 4))

    def errors(i: int) -> Tensor:
        """Of each token that counts."""
        error, mask = (run(i) - target(i)).float().square().sum(-1), masks[i]
        return error.flatten() if mask is None else error[mask]

    def judged() -> float:
        with torch.no_grad():
            return sum(float(errors(i).mean()) for i in range(held)) / held

    def shuffled() -> Iterator[int]:
        while True:
            yield from (first + torch.randperm(len(masks) - first, generator=generator)).tolist()[::-1]

    def learn_from(batches: Iterator[int]) -> None:
        seen = 0
        for i in itertools.islice(batches, len(masks) - first):  # all of them at most
            found = errors(i)
            found.sum().backward()
            if (seen := seen + found.numel()) >= STEP_TOKENS:
                return

    first = held if len(masks) >= 4 else 0
    before = judged()
    inputs: list[LearnedSite] = []
    learning: dict[str, LearnedLinear] = {}
    for site in (*sites, *(FoldableSite((path,)) for path in start if all(path not in s.paths for s in sites))):
        paths = [path for path in site.paths if path in start]
        if paths:
            if len(paths) < len(site.paths) or any(start[path].side is not None for path in paths):
                site = replace(site, fold=None)  # others read the input that would be folded
            inputs.append(LearnedSite(start[paths[0]].input, site, learn))
            learning |= {path: LearnedLinear(start[path], floats[path], inputs[-1], learn) for path in paths}
    missing = tuple(name for name in learn if name not in LEARN and all(name not in site.learns for site in inputs))
    for path, module in learning.items():
        block.set_submodule(path, module)
    parts: list[LearnedLinear | LearnedSite] = [*learning.values(), *inputs]
    generator = torch.Generator().manual_seed(seed)
    batches, step, taken = shuffled(), 0, False
    try:
        while step < steps and not (step == steps // 2 and judged() > HOPELESS * before):
            with torch.enable_grad():
                learn_from(batches)
            rate = (1 - step / steps) / steps
            for part in parts:
                part.descend(rate)
            step += 1
        after = judged()
        taken = after < before
    finally:
        for path, module in learning.items():
            block.set_submodule(path, module.learned() if taken else module.module)
    folded = [each.settle() for each in inputs if taken]
    if any(folded):
        after = judged()  # of what stays
    return Reconstruction(before, after, taken, step, missing)
