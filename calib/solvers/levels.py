"""Scales of level grids: what the papers set, and the search that rounding after training needs."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.quantizers import LevelSpec, grouped

RATIOS = torch.linspace(1.0, 0.2, 33).tolist()  # of the published scale; that is meant for training, where weights move
TWN_THRESHOLD = 0.7  # of the mean magnitude (arXiv 1605.04711)


def published_scale(weight: Tensor, spec: LevelSpec) -> Tensor:
    """fp32 scale of each granule of weight [out, in], as the paper of the grid sets it."""
    size = grouped(weight, spec).abs()
    if spec.kind in ("seq", "lsq"):
        largest = size.amax(-1, keepdim=True)
        if spec.kind == "lsq":
            return largest / spec.qmax
        return largest / spec.levels if spec.odd else largest / 1.5
    mean = size.mean(-1, keepdim=True)
    if spec.kind == "twn":
        kept = size > TWN_THRESHOLD * mean
        return (size * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return mean * 4 / 3 if spec.kind == "tbt" else mean


def level_scale(weight: Tensor, spec: LevelSpec, importance: Tensor | None = None) -> Tensor:
    """Scale (fp16) of each granule; with range ``mse`` the least squared error over 33 ratios of the published one.

    importance [in]: weights of the squared errors, the second moments of the inputs. A binary grid needs no search: the
    best scale of its signs is the weighted mean magnitude.
    """
    scale = published_scale(weight, spec)
    if spec.range == "published":
        return scale.half()
    cost = torch.ones(weight.shape[1]) if importance is None else importance.float()
    view, cost = grouped(weight, spec), grouped(cost.to(weight.device), spec)
    if spec.kind == "binary":
        return ((view.abs() * cost).sum(-1, keepdim=True) / cost.sum(-1, keepdim=True).clamp(min=1e-30)).half()
    least, best = torch.full_like(scale, torch.inf), scale.half()
    for ratio in RATIOS:
        trial = (scale * ratio).half()
        values = grouped(spec.decode(spec.encode(weight, trial), trial), spec)
        error = (values - view).square_().mul_(cost).sum(-1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, trial, best)
    return best


def level_codes(weight: Tensor, scale: Tensor, spec: LevelSpec) -> Tensor:
    """Codes (int8) of a weight: the nearest levels, but TWN's by its own threshold."""
    if spec.kind != "twn":
        return spec.encode(weight, scale)
    view = grouped(weight, spec)
    size = view.abs()
    kept = size > TWN_THRESHOLD * size.mean(-1, keepdim=True)
    return (view.sign() * kept).to(torch.int8).reshape(weight.shape)
