"""Straight-through gradients of the weight grids, as published: what recovery training needs.

Scales broadcast against the weight: one a row [out, 1], one a group of a grouped view [out, n, 1], one in all [].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from calib.errors import InputError
from calib.quantizers.affine import AffineSpec, grouped
from calib.quantizers.dual_binary import DualBinarySpec
from calib.quantizers.weight import AnyWeight

SMALLEST = 1e-5  # of a scale
INSIDE = 0.99  # of a SEQ range: what lies beyond gets no gradient
GELU_MINIMUM = -0.16997120747990369  # of x Phi(x), at x = -0.75179


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: AnyWeight) -> Tensor:
    """The values [out, in] that a weight has on a grid, to the bit what its codes will decode to; published gradients.

    scale: fp32, shaped as ``spec.scale_shape``; what is stored of it (fp16 of low-bit grids) is what counts. Ternary
    grids whose scale is a statistic learn it here as LSQ does.
    """
    with torch.no_grad():
        stored = scale.to(spec.scale_dtype)
        values = spec.decode(spec.encode(weight, stored, zero_point), stored, zero_point).to(weight.dtype)
    return standing(_surrogate(grouped(weight, spec), scale, zero_point, spec).view_as(weight), values)


def standing(surrogate: Tensor, values: Tensor) -> Tensor:
    """``values``, to the bit, with the gradient of ``surrogate``."""
    made: Tensor = _Standing.apply(surrogate, values)
    return made


def _surrogate(view: Tensor, scale: Tensor, zero_point: Tensor, spec: AnyWeight) -> Tensor:
    """What stands for the grouped weight on its grid, by the functions below."""
    if isinstance(spec, AffineSpec):
        return affine(view, scale, zero_point, spec)
    if isinstance(spec, DualBinarySpec):
        sign = torch.where(scale[..., :1] < 0, -1.0, 1.0)
        a2 = (sign * scale[..., 1:]).clamp(max=-SMALLEST)
        return sign * dual_binary(sign * view, torch.maximum(sign * scale[..., :1], SMALLEST - a2), a2)
    if spec.kind == "seq":
        return seq(view, scale * (1.5 if spec.levels == 3 else spec.levels), spec.levels)
    if spec.kind == "lsq":
        return lsq(view, scale, spec.levels)
    return elastic_binary(view, scale) if spec.kind == "binary" else _learned_step(view, scale, -1, 1, _gain(view, 1))


class _Scaled(Function):
    """The values, given what they mean to their arguments: dL/dw = up inside, dL/da = gain sum(up slope)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, values: Tensor, inside: Tensor, slope: Tensor, gain: float) -> Tensor:
        ctx.save_for_backward(inside, slope)
        ctx.shape, ctx.gain = a.shape, gain
        return values

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> Any:
        inside, slope = ctx.saved_tensors
        return up * inside, (up * slope).sum_to_size(ctx.shape) * ctx.gain, None, None, None, None


def seq(weight: Tensor, a: Tensor, levels: int) -> Tensor:
    """ParetoQ's stretched elastic quantizer (arXiv 2502.02631) for 3, 4, 8 or 16 levels on [-a, a].

    dL/da takes value / a - w / a inside and -+ the outermost level beyond. (The paper's code has 1 there for three
    levels, whose outermost is 2/3.)
    """
    a = a.clamp(min=SMALLEST)
    with torch.no_grad():
        half, offset = (1.5, 0.0) if levels == 3 else (levels / 2, 0.5)
        q = weight / a
        unit = ((q.clamp(-INSIDE, INSIDE) * half - offset).round() + offset) / half
        inside = q.abs() <= INSIDE
        edge = (levels - 1) / levels
        slope = torch.where(inside, unit - q, edge * q.sign())
    return _Scaled.apply(weight, a, unit * a, inside, slope, _gain(weight, 1))


def lsq(weight: Tensor, a: Tensor, levels: int) -> Tensor:
    """LSQ (ParetoQ at 3 and 4 bits): a clip(round(w / a), -levels/2, levels/2 - 1)."""
    low, high = -(levels // 2), levels // 2 - 1
    return _learned_step(weight, a, low, high, _gain(weight, high))


def affine(x: Tensor, a: Tensor, zero_point: Tensor, spec: AffineSpec) -> Tensor:
    """LSQ (arXiv 1902.08153) on an affine grid whose zero point is held: a (clip(round(x / a) + z) - z). One bit with a
    sign is ``elastic_binary``; float8 rounds to its own numbers."""
    if spec.binary:
        return elastic_binary(x, a)
    zero = zero_point.to(x.dtype)
    nearest = torch.round if spec.integer else lambda q: spec.snap(q.float().clone()).to(q.dtype)
    return _learned_step(x, a, spec.qmin - zero, spec.qmax - zero, _gain(x, max(1, spec.qmax)), nearest)


def elastic_binary(weight: Tensor, a: Tensor) -> Tensor:
    """ParetoQ at 1 bit: a sign(w), sign(0) = 1; the gradient of w stops where |w| > a."""
    a = a.clamp(min=SMALLEST)
    with torch.no_grad():
        sign = torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
        inside = weight.abs() <= a
    return _Scaled.apply(weight, a, sign * a, inside, sign, _gain(weight, 1))


def tbt(weight: Tensor, levels: Literal[2, 3]) -> Tensor:
    """TBT's weights (ACL 2023): the scale is a statistic of each row [.., n], the gradient of w the identity."""
    with torch.no_grad():
        mean = weight.abs().mean(-1, keepdim=True)
        if levels == 2:
            values = torch.where(weight < 0, -mean, mean)
        else:
            a = (mean * 4 / 3).clamp(min=SMALLEST)
            values = (weight / a).clamp(-1, 1).round() * a
    return weight + (values - weight).detach()


def elastic_activation(x: Tensor, a: Tensor, bits: Literal[1, 2], minimum: float | None = None) -> Tensor:
    """TBT's elastic activations, one learned scale a []. 1 bit: +-a; 2 bits: {-a, 0, a}.

    minimum: given for inputs that have one (softmax and ReLU 0, GELU ``GELU_MINIMUM``): codes then count up from it,
    {0, a} and {0, a, 2a}. The analytic minimum stands in for the paper's minimum of the batch, which would make the
    grid depend on what else is in it.
    """
    gain = _gain(x, 2 if minimum is not None and bits == 2 else 1)
    if minimum is None:
        return elastic_binary(x, a) if bits == 1 else _learned_step(x, a, -1, 1, gain)
    return _learned_step(x - minimum, a, 0, bits, gain) + minimum


def initial_activation_scale(x: Tensor, bits: Literal[1, 2], signed: bool) -> Tensor:
    """TBT's first scale [], from the first batch."""
    return x.abs().mean() * (2.0 if signed else 4.0 / math.sqrt(2**bits - 1))


def dual_binary(weight: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """DB-LLM's a1 b1 + a2 b2 (arXiv 2402.11960), a2 < 0 < a1 + a2.

    dL/da1 = sum up b1, dL/da2 = sum up b2: thresholds are held. Through the steps the gradient is the identity in the
    argument, dL/dw = up (a1 - a2). Raises InputError where the order is broken.
    """
    if not bool(((a2 < 0) & (a1 + a2 > 0)).all()):
        raise InputError("dual binary scales want a2 < 0 < a1 + a2", "clamp them after every step: a1 >= -a2 + 1e-5")
    with torch.no_grad():
        first, second = (a1 + a2) / 2, a1 + a2 / 2
        b1 = (weight >= first).to(weight.dtype)
        b2 = torch.where(b1 > 0, weight <= second, weight <= a2 / 2).to(weight.dtype)
    steps = weight - weight.detach()  # zero, with the identity as gradient
    return a1 * b1 + a2 * b2 + (a1 - a2).detach() * steps


def _learned_step(
    x: Tensor,
    a: Tensor,
    low: int | Tensor,
    high: int | Tensor,
    gain: float,
    nearest: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    a = a.clamp(min=SMALLEST)
    with torch.no_grad():
        q = x / a
        codes = nearest(q).clamp(low, high)  # type: ignore[arg-type]  # both numbers, or both tensors
        inside = (q >= low) & (q <= high)
        slope = torch.where(inside, codes - q, codes)
    return _Scaled.apply(x, a, codes * a, inside, slope, gain)


def _gain(x: Tensor, largest: int) -> float:
    return 1.0 / math.sqrt(x.numel() * largest)


class _Standing(Function):
    """``values``, with the gradient of ``surrogate``."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> Any:
        return up, None
