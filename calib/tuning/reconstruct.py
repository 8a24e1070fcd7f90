"""Block reconstruction: learn how a block's weights are rounded and clipped, by the error of the block's output.

Signed gradient descent on rounding offsets and on the scales' factors, as in AutoRound (arXiv 2309.05516), from any
start: a weight that GPTQ rounded begins where its codes are, so the start is what the solver found, not round to
nearest. Kept only where the error on windows held fixed falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.errors import InputError
from calib.nn import CalledAsWeight, QuantLinear
from calib.quantizers import AffineSpec, grouped

INSIDE = 0.49  # how far from its code a weight may lie at the start
FACTORS = (0.7, 1.2)  # of a scale
OFFSET_RATE, FACTOR_RATE = 0.1, 0.03  # a tenth of AutoRound's: the start is a solver's, and large steps leave it


class LearnedLinear(CalledAsWeight, nn.Module):
    """Stands in for a QuantLinear while its codes are learned; straight-through gradients.

    weight [m, n] float, of transformed input. offset v [m, n] in [-0.5, 0.5] and factor f (shaped like the scale) give
    codes round(u / f + v), u the weight over its scale, moved where need be until it rounds to the code it has.
    """

    def __init__(self, module: QuantLinear, weight: Tensor) -> None:
        super().__init__()
        spec = module.weight_spec
        if not isinstance(spec, AffineSpec):
            raise InputError(f"learned rounding is for affine grids, not {spec.kind}", "leave out refine")
        self.module, self.spec, self.shape = module, spec, weight.shape
        scale, zero = module.weight_scale, module.weight_zero_point
        self.scale = scale
        self.zero = torch.zeros((), dtype=torch.float32) if zero is None else zero.float()
        codes = grouped(module.codes(), spec).float() - self.zero
        found = grouped(weight.float(), spec) / scale
        self.start = codes + (found - codes).clamp_(-INSIDE, INSIDE)
        self.offset = nn.Parameter(torch.zeros_like(self.start))
        self.factor = nn.Parameter(torch.ones_like(scale))

    def _codes(self) -> Tensor:
        moved = self.start / self.factor + self.offset + self.zero
        rounded = moved + (moved.round() - moved).detach()
        return rounded.clamp(self.spec.qmin, self.spec.qmax)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self._codes() - self.zero) * (self.scale * self.factor)
        module = self.module
        moved = module.input.transformed(x)
        y = F.linear(_on_grid(module, moved), weight.view(self.shape), module.bias)
        return y if module.side is None else y + module.side(moved)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One signed step. rate: from 1 / steps to 0 over a run."""
        for parameter, own, (low, high) in (
            (self.offset, OFFSET_RATE, (-0.5, 0.5)),
            (self.factor, FACTOR_RATE, FACTORS),
        ):
            if parameter.grad is not None:  # an expert that no token reached has none
                parameter.sub_(parameter.grad.sign_(), alpha=own * rate).clamp_(low, high)
                parameter.grad = None

    @torch.no_grad()
    def learned(self) -> QuantLinear:
        """The module, with the codes and scales that were learned."""
        codes = self._codes().to(torch.int8).view(self.shape)
        self.module.set_codes(codes, self.scale * self.factor, self.zero)
        return self.module


def _on_grid(module: QuantLinear, moved: Tensor) -> Tensor:
    """The module's input grid on its transformed input; gradients pass where a static range does not clip."""
    quantizer = module.input
    if quantizer.spec is None:
        return moved
    with torch.no_grad():
        got = quantizer.on_grid(moved)
    if quantizer.scale is None:
        return moved + (got - moved).detach()
    inside = (moved - got).detach().abs() <= quantizer.scale
    return torch.where(inside, moved, got) + torch.where(inside, got - moved, 0.0).detach()


@dataclass(frozen=True)
class Reconstruction:
    """before, after: the block's mean squared output error on the windows held fixed; taken: whether it fell."""

    before: float
    after: float
    taken: bool
    steps: int


def reconstruct(
    block: nn.Module,
    floats: Mapping[str, Tensor],
    run: Callable[[int], Tensor],
    target: Callable[[int], Tensor],
    masks: Sequence[Tensor | None],
    steps: int,
    seed: int,
    held: int = 2,
) -> Reconstruction:
    """Learn the codes and scales of the block's QuantLinears named in ``floats`` (their weights, [m, n]).

    run(i): the block's output on batch i; target(i): what it should be. masks[i]: which tokens count. Every step takes
    one batch; rates fall linearly to 0. held: how many of the first batches judge start and end; they are
    not learned from where there are four times as many.
    """
    start = {path: module for path in floats if isinstance(module := block.get_submodule(path), QuantLinear)}
    held = min(held, len(masks))

    def loss(i: int) -> Tensor:
        error = (run(i) - target(i)).float().square().sum(-1)
        mask = masks[i]
        return error.mean() if mask is None else error[mask].mean()

    def judged() -> float:
        with torch.no_grad():
            return sum(float(loss(i)) for i in range(held)) / held

    first = held if len(masks) >= 4 * held else 0
    before = judged()
    learning = {path: LearnedLinear(module, floats[path]) for path, module in start.items()}
    saved = {path: (m.codes().clone(), m.weight_scale.clone()) for path, m in start.items()}
    for path, module in learning.items():
        block.set_submodule(path, module)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    try:
        with torch.enable_grad():
            for step in range(steps):
                if not order:
                    order = (first + torch.randperm(len(masks) - first, generator=generator)).tolist()
                loss(order.pop()).backward()
                for module in learning.values():
                    module.descend((1 - step / steps) / steps)
    finally:
        for path, module in learning.items():
            block.set_submodule(path, module.learned())
    after = judged()
    taken = after < before
    if not taken:
        for path, (codes, scale) in saved.items():
            zero = start[path].weight_zero_point
            start[path].set_codes(codes, scale, scale.new_zeros(()) if zero is None else zero)
    return Reconstruction(before, after, taken, steps)
