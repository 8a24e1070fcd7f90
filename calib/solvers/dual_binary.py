"""Scales of the two planes of DB-LLM (arXiv 2402.11960), found without training."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.quantizers import DualBinarySpec, grouped
from calib.quantizers.dual_binary import planes

ROUNDS = 8


def dual_scale(
    weight: Tensor,
    spec: DualBinarySpec,
    importance: Tensor | None = None,
    signs: tuple[float, ...] = (1.0, -1.0),
) -> Tensor:
    """Scales (fp16, [..., 2]) of the granules of weight [out, in].

    Range ``published``: (max|w|, -max|w| / 2). ``mse``: from there, on w times each of signs, nearest levels and least
    squares for (a1, a2) in turn; a step that breaks the order a2 < 0 < a1 + a2 or raises the error is not taken; each
    granule keeps the sign with the smallest error. importance [in]: weights of the squared errors.
    """
    view = grouped(weight, spec)
    largest = view.abs().amax(-1, keepdim=True)
    if spec.range == "published":
        return torch.cat([largest, -largest / 2], -1).half()
    cost = torch.ones(weight.shape[1]) if importance is None else importance.float()
    cost = grouped(cost.to(weight.device), spec)
    scales, errors = zip(*(_alternate(sign * view, largest, cost) for sign in signs), strict=True)
    best = torch.stack(errors).argmin(0).unsqueeze(0)
    signed = torch.stack([sign * scale for sign, scale in zip(signs, scales, strict=True)])
    return torch.take_along_dim(signed, best, 0)[0].half()


def _alternate(view: Tensor, largest: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """(a1, a2) as [..., 2] and the weighted squared error [..., 1] of each granule."""
    a1, a2 = largest, -largest / 2
    first, second = planes(view, a1, a2)
    error = _error(view, first, second, a1, a2, cost)
    for _ in range(ROUNDS):
        b1, b2 = first * cost, second * cost
        g11, g22, g12 = (t.sum(-1, keepdim=True) for t in (b1, b2, b1 * second))
        y1, y2 = (b1 * view).sum(-1, keepdim=True), (b2 * view).sum(-1, keepdim=True)
        det = g11 * g22 - g12 * g12
        usable = det > 1e-6 * g11 * g22  # else a plane is empty, or both are one
        det = det.masked_fill(~usable, 1.0)
        n1, n2 = (g22 * y1 - g12 * y2) / det, (g11 * y2 - g12 * y1) / det
        usable &= (n2 < 0) & (n1 + n2 > 0)
        n1, n2 = torch.where(usable, n1, a1), torch.where(usable, n2, a2)
        b1, b2 = planes(view, n1, n2)
        after = _error(view, b1, b2, n1, n2, cost)
        better = after < error
        if not bool(better.any()):
            break
        a1, a2, error = (torch.where(better, n, o) for n, o in ((n1, a1), (n2, a2), (after, error)))
        first, second = torch.where(better, b1, first), torch.where(better, b2, second)
    return torch.cat([a1, a2], -1), error


def _error(view: Tensor, first: Tensor, second: Tensor, a1: Tensor, a2: Tensor, cost: Tensor) -> Tensor:
    return (first * a1 + second * a2 - view).square_().mul_(cost).sum(-1, keepdim=True)
