"""How a range is chosen: extremes, percentile, or the least (weighted) squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.errors import InputError, NumericsError
from calib.quantizers.affine import AffineSpec, fake_quantize, grouped, minmax, qparams

WEIGHT_RATIOS = [1.0 - 0.02 * k for k in range(36)]  # 1.0 down to 0.3
TENSOR_RATIOS = [2.0 ** (-k / 8) for k in range(57)]  # 1 to 1/128: a sink may be a hundred times the rest
BLOCK = 1 << 18  # elements searched at a time: the candidates then run in cache


def weight_range(weight: Tensor, spec: AffineSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Range (lo, hi) of a weight [out, in] at the spec's granularity, shaped to broadcast against
    ``grouped(weight)``.

    With rule ``mse`` both ends shrink by the ratio (1.0 down to 0.3) with the least squared error, each error
    weighted by ``importance`` [in], the second moments of the inputs: without it, clipping cuts the very
    columns that an activation scale has enlarged. Raises NumericsError on NaN or infinity, InputError on an
    importance that does not fit.
    """
    weight = weight.detach().float()
    lo, hi = minmax(weight, spec)
    _require_finite(lo, hi, "a weight")
    if importance is not None and importance.shape != weight.shape[-1:]:
        raise InputError(
            f"importance {tuple(importance.shape)} for a weight of {weight.shape[-1]} inputs",
            "give one value an input",
        )
    if importance is not None:
        _require_finite(importance, importance, "the importance of a weight's inputs")
    if spec.range == "percentile":
        tail = (100.0 - spec.percentile) / 200.0
        if spec.granularity == "tensor":
            return _tails(weight.reshape(-1), tail)
        ends = [_tails(rows, tail) for rows in _row_blocks(grouped(weight, spec))]
        low, high = (torch.cat(end).unsqueeze(-1) for end in zip(*ends, strict=True))
        return low, high
    if spec.range != "mse":
        return lo, hi
    cost = None if importance is None else importance.to(weight)
    if spec.granularity == "tensor":
        ratio = torch.stack([_error(weight, lo, hi, r, spec, cost).sum() for r in WEIGHT_RATIOS]).argmin()
        best = lo.new_tensor(WEIGHT_RATIOS)[ratio]
        return lo * best, hi * best
    ratios = torch.cat(
        [
            _best_ratio(w, low, high, spec, cost)
            for w, low, high in zip(_row_blocks(weight), _like(lo, weight), _like(hi, weight), strict=True)
        ]
    )
    return lo * ratios, hi * ratios


def _best_ratio(weight: Tensor, lo: Tensor, hi: Tensor, spec: AffineSpec, cost: Tensor | None) -> Tensor:
    """Shaped like lo: the ratio with the least error; the largest of equals."""
    least, best = torch.full_like(lo, torch.inf), torch.ones_like(lo)
    for ratio in WEIGHT_RATIOS:
        error = _error(weight, lo, hi, ratio, spec, cost)
        better = error < least
        least = torch.where(better, error, least)
        best.masked_fill_(better, ratio)
    return best


def _error(weight: Tensor, lo: Tensor, hi: Tensor, ratio: float, spec: AffineSpec, cost: Tensor | None) -> Tensor:
    error = fake_quantize(weight, *qparams(lo * ratio, hi * ratio, spec), spec).sub_(weight).square_()
    if cost is not None:
        error.mul_(cost)
    return grouped(error, spec).sum(-1, keepdim=True)


def tensor_range(
    rows: Tensor, lo: Tensor, hi: Tensor, spec: AffineSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Static per-tensor range of an activation: a pair of fp32 scalars [].

    rows [T, n]: a sample. lo, hi []: extremes over *all* calibration rows. importance [n]: what a squared
    error in each channel costs (the consumers' column energies). ``mse`` minimises the weighted error over
    the sample, shrinking the two ends in turn, and never does worse on it than (lo, hi). Raises NumericsError
    on NaN or infinity.
    """
    lo, hi = lo.detach().float(), hi.detach().float()
    _require_finite(lo, hi, "an activation")
    if spec.range == "minmax":
        return lo, hi
    rows = rows.detach().float()
    if spec.range == "percentile":
        low, high = _tails(rows.reshape(-1), (100.0 - spec.percentile) / 200.0)
        return low.clamp(max=0.0), high.clamp(min=0.0)
    start = lo.clamp(max=0.0), hi.clamp(min=0.0)
    bottom, top = float(start[0]), float(start[1])
    if top - bottom <= 0 or rows.numel() == 0:
        return lo, hi
    values, mass = _histogram(rows, importance)

    def loss(a: float, b: float) -> float:
        scale, zero_point = qparams(values.new_tensor(a), values.new_tensor(b), spec)
        return float((fake_quantize(values, scale, zero_point, spec) - values).square_().double() @ mass)

    if spec.symmetric:
        bound = max(-bottom, top)
        best = min(TENSOR_RATIOS, key=lambda r: loss(-bound * r, bound * r))
        found = lo.new_tensor(-bound * best), lo.new_tensor(bound * best)
    else:
        both = min(TENSOR_RATIOS, key=lambda r: loss(bottom * r, top * r))
        a, b = bottom * both, top * both
        for _ in range(2):
            a = bottom * min(TENSOR_RATIOS, key=lambda r: loss(bottom * r, b))
            b = top * min(TENSOR_RATIOS, key=lambda r: loss(a, top * r))
        found = lo.new_tensor(a), lo.new_tensor(b)
    exact = [_sample_error(rows, *ends, spec, importance) for ends in (start, found)]
    return found if exact[1] <= exact[0] else (lo, hi)


def _histogram(rows: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Centroids (fp32) and masses (fp64) of the values, in bins as wide as 2^-9 of the value itself.

    The bins are the leading 18 bits of a float (sign, exponent, 9 of the mantissa): a sink a thousand times
    the typical value, for which even bins would put all the rest into one, leaves the rest resolved finer
    than any 8-bit grid.
    """
    values = rows.reshape(-1)
    weight = torch.ones_like(rows) if importance is None else importance.to(rows).expand_as(rows)
    weight = weight.reshape(-1).double()
    bins = (values.view(torch.int32) >> 14) + (1 << 17)
    mass = torch.bincount(bins, weight, 1 << 18)
    moment = torch.bincount(bins, weight * values, 1 << 18)
    kept = mass > 0
    return (moment[kept] / mass[kept]).float(), mass[kept]


def _sample_error(rows: Tensor, lo: Tensor, hi: Tensor, spec: AffineSpec, importance: Tensor | None) -> float:
    scale, zero_point = qparams(lo, hi, spec)
    total = 0.0
    for block in _row_blocks(rows):
        error = fake_quantize(block, scale, zero_point, spec).sub_(block).square_()
        if importance is not None:
            error.mul_(importance.to(error))
        total += float(error.sum(dtype=torch.float64))
    return total


def _tails(values: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Quantiles ``tail`` and 1 - ``tail`` of the last dimension (torch.quantile stops at 16M values)."""
    ordered = values.sort(dim=-1).values
    position = tail * (ordered.shape[-1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[-1] - 1)
    part = position - below
    low = ordered[..., below].lerp(ordered[..., above], part)
    return low, ordered[..., -1 - below].lerp(ordered[..., -1 - above], part)


def _row_blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, BLOCK // max(x[0].numel(), 1))) if len(x) else (x,)


def _like(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """x split where ``_row_blocks`` splits rows."""
    return x.split(max(1, BLOCK // max(rows[0].numel(), 1))) if len(rows) else (x,)


def _require_finite(lo: Tensor, hi: Tensor, what: str) -> None:
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise NumericsError(f"{what} holds NaN or infinity", "repair the checkpoint or the data, or exclude the layer")
