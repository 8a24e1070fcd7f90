"""Channel-wise shift and scale: X~ = (X - z) / s, folded where it is free, fused into the quantizer where it is not.

Source: Outlier Suppression+ (arXiv 2304.09145), section 4.1 and its fold into LayerNorm and linear weights. Consumers
take b <- b + W z, then W <- W diag(s). A norm takes beta <- (beta - z) / s, gamma <- gamma / s; a linear producer
divides its rows. What no producer can take, the consumers' input quantizer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calib.errors import InputError
from calib.nn import ActivationQuantizer
from calib.nn.hadamard import block_hadamard
from calib.transforms.site import FoldTarget

Run = Callable[[], Tensor]
TOLERANCE = 1e-5


class SiteTransform:
    """The live transforms of one site while its block is calibrated: folds in the weights, the rest in input hooks."""

    def __init__(self, target: FoldTarget) -> None:
        self.target = target
        self.input = ActivationQuantizer(None, target.features)
        self._handles = [
            consumer.register_forward_pre_hook(lambda _, args: (self.input.transform(args[0]), *args[1:]))
            for consumer in target.consumers
        ]

    @property
    def fused(self) -> bool:
        """True where the consumers' input carries an affine."""
        return self.input.shift is not None or self.input.rescale is not None

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def fold(self, shift: Tensor | None, scale: Tensor | None) -> None:
        """Move (z, s) [n] into the producer; InputError where it cannot take a shift."""
        producer = self.target.producer
        if producer is None:
            raise InputError(f"nothing can absorb a fold before {self.target.name}", "use the fused form")
        z, s = self.target.to_producer(shift, 0.0), self.target.to_producer(scale, 1.0)
        if self.input.hadamard > 1:
            raise InputError(f"{self.target.name} is already rotated", "fold before the rotation")
        producer.absorb(z, s)
        self._absorb(shift, scale)

    def fuse(self, shift: Tensor | None, scale: Tensor | None) -> None:
        """Let the input quantizer compute (x - z) / s."""
        if self.input.hadamard > 1:
            raise InputError(f"{self.target.name} is already rotated", "fuse before the rotation")
        old_z, old_s = self.input.shift, self.input.rescale
        if shift is not None:
            moved = shift if old_s is None else shift * old_s  # ((x - z0)/s0 - z)/s = (x - z0 - s0 z)/(s0 s)
            self.input.shift = moved.clone() if old_z is None else old_z + moved
        if scale is not None:
            self.input.rescale = scale.clone() if old_s is None else old_s * scale
        self._absorb(shift, scale)

    def rotate(self, block: int, foldable: bool = False) -> None:
        """Turn the consumers' input by a block Hadamard, and their weights back.

        foldable: a Linear producer takes it where its channels allow (value projections, by heads), else online.
        """
        if self.target.features % block:
            raise InputError(f"Hadamard block {block} does not divide {self.target.features}", "choose a divisor")
        if foldable and (starts := self.target.runs(block)) is not None and not self.fused:
            assert self.target.producer is not None
            self.target.producer.rotate(starts, block)
        else:
            self.input.hadamard = block
        with torch.no_grad():
            for consumer in self.target.consumers:
                consumer.weight.copy_(block_hadamard(consumer.weight, block))

    def _absorb(self, shift: Tensor | None, scale: Tensor | None) -> None:
        with torch.no_grad():
            for consumer in self.target.consumers:
                if shift is not None:
                    added = consumer.weight @ shift.to(consumer.weight.dtype)
                    bias = added if consumer.bias is None else consumer.bias + added
                    consumer.bias = nn.Parameter(bias, requires_grad=False)
                if scale is not None:
                    consumer.weight.mul_(scale.to(consumer.weight.dtype))


@contextmanager
def undone_on_failure(
    transform: SiteTransform, run: Run, tolerance: float, before: Tensor | None = None
) -> Iterator[list[float]]:
    """Prove what is done inside: the block's output before and after must agree, else every tensor is put back.

    before: the output to compare with, where it is known. Yields a list that holds the relative error afterwards: the
    largest, over tokens, of |after - before| / |before|.
    """
    modules: list[nn.Module] = [*transform.target.consumers]
    if transform.target.producer is not None:
        modules.append(transform.target.producer.module)
    saved = [{name: p.detach().clone() for name, p in m.named_parameters(recurse=False)} for m in modules]
    state = (transform.input.shift, transform.input.rescale, transform.input.hadamard)
    before = run() if before is None else before
    error: list[float] = []
    yield error
    error.append(relative_error(run(), before))
    if not error[0] <= tolerance:
        for module, parameters in zip(modules, saved, strict=True):
            for name in [n for n, p in module.named_parameters(recurse=False) if n not in parameters]:
                setattr(module, name, None)
            for name, value in parameters.items():
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        transform.input.shift, transform.input.rescale, transform.input.hadamard = state


def tolerance_for(run: Callable[[Tensor], Tensor], hidden: Tensor, before: Tensor) -> float:
    """What error a correct fold may leave in fp32: 1e-5, or four times what rounding the input does to the output.

    A block that amplifies rounding (massive activations that cancel) is not held to more than it can keep.
    """
    generator, hidden = torch.Generator().manual_seed(0), hidden.float()
    sign = torch.randint(0, 2, hidden.shape, generator=generator).to(hidden) * 2 - 1
    noise = relative_error(run(hidden * (1 + torch.finfo(torch.float32).eps * sign)), before)
    return min(max(TOLERANCE, 4 * noise), 100 * TOLERANCE) if noise == noise else TOLERANCE


def relative_error(after: Tensor, before: Tensor) -> float:
    """Largest over rows of |after - before|_2 / |before|_2, in fp64; inf where either is not finite."""
    a, b = after.double().flatten(0, -2), before.double().flatten(0, -2)
    error = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)
    return float(error.amax()) if bool(torch.isfinite(error).all()) else float("inf")
