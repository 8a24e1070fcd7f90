"""Outlier Suppression+ (arXiv 2304.09145): channel shift by the midpoint, channel scale by one searched threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor], float]


@dataclass(frozen=True)
class Search:
    """Outcome of a threshold search. curve: (threshold, loss) of every candidate scored, in order."""

    threshold: float
    scale: Tensor
    loss: float
    identity_loss: float
    curve: tuple[tuple[float, float], ...]


def midpoint(lo: Tensor, hi: Tensor) -> Tensor:
    """Eq. 5: z_j = (max_j + min_j) / 2. lo, hi [n]: channel extremes. After it every channel is symmetric about 0."""
    return (lo + hi) / 2


def scale_for(absmax: Tensor, threshold: float) -> Tensor:
    """Eq. 8: s_j = max(1, absmax_j / t). absmax [n], of the shifted tensor; channels within the threshold stay."""
    return (absmax / threshold).clamp(min=1.0)


def exhaustive_grid(absmax: Tensor, lower: float = 1.0) -> list[float]:
    """The paper code's grid: t = T, T - d, ... >= L with d = (T - L) / K, K = max(100, floor(T / 0.5)).

    T is the largest magnitude. L shrinks to T / 100 where T <= 100 L, so that small tensors are searched as well
    (the original skips the search without a word when T < L).
    """
    top = float(absmax.amax())
    lower = min(lower, top / 100)
    count = max(100, int(top / 0.5))
    step = (top - lower) / count
    return [top - i * step for i in range(count + 1)] if top > 0 else []


def fast_grid(absmax: Tensor, count: int = 91) -> list[float]:
    """``count`` log-spaced thresholds from T down to a quarter of the median channel (or T / 64, if that is lower)."""
    top = float(absmax.amax())
    if top <= 0:
        return []
    bottom = max(min(float(absmax.median()) / 4, top / 64), top / 4096)
    return [top * (bottom / top) ** (i / (count - 1)) for i in range(count)]


def search_exhaustive(absmax: Tensor, loss: Loss, grid: Sequence[float] | None = None) -> Search:
    """Score every threshold of the grid; strict improvement only, so ties go to the larger threshold."""
    candidates = exhaustive_grid(absmax) if grid is None else list(grid)
    identity = loss(torch.ones_like(absmax))
    best, curve = (float("inf"), identity), [(float("inf"), identity)]
    for threshold in candidates:
        curve.append((threshold, loss(scale_for(absmax, threshold))))
        if curve[-1][1] < best[1]:
            best = curve[-1]
    return Search(best[0], scale_for(absmax, best[0]), best[1], identity, tuple(curve))


def spread(grid: Sequence[float], count: int) -> list[float]:
    """About ``count`` thresholds of the grid, evenly spaced in their logarithm, largest first."""
    if len(grid) <= count:
        return sorted(grid, reverse=True)
    top, ratio = max(grid), min(grid) / max(grid)
    steps = [top * ratio ** (i / (count - 1)) for i in range(count)]
    return sorted({min(grid, key=lambda t: abs(t - step)) for step in steps}, reverse=True)


def rank_coarse(
    absmax: Tensor, rank: Loss, grid: Sequence[float] | None = None, count: int = 16
) -> list[tuple[float, float]]:
    """(threshold, loss) of s = 1 (threshold inf) and of ``count`` thresholds spread over the grid, largest first."""
    few = spread(fast_grid(absmax) if grid is None else grid, count)
    return [(float("inf"), rank(torch.ones_like(absmax))), *((t, rank(scale_for(absmax, t))) for t in few)]


def search_fast(
    absmax: Tensor,
    rank: Loss,
    exact: Loss,
    coarse: Sequence[tuple[float, float]] | None = None,
    grid: Sequence[float] | None = None,
    count: int = 46,
    around: int = 6,
    keep: int = 8,
    margin: float = 0.1,
) -> Search:
    """Rank about half of the grid and all of it around the best, then score s = 1 and the short list exactly.

    rank, exact: the same objective on few and on many rows. coarse: ``rank_coarse``'s result, where it is known. grid:
    the candidates (default: ``fast_grid``). count: how many are ranked wherever they lie; around: beside how many of
    the best all are (real losses are jagged: neighbours differ by up to 15 %). The short list: at most ``keep``, ranked
    within ``margin`` of the best. The scale returned is never worse than s = 1 on ``exact``.
    """
    grid = sorted(fast_grid(absmax) if grid is None else grid, reverse=True)
    start, *ranked = rank_coarse(absmax, rank, grid, count) if coarse is None else coarse
    known = dict(ranked)
    known |= {t: rank(scale_for(absmax, t)) for t in spread(grid, count) if t not in known}
    while new := _narrowed(grid, known, around):
        known |= {t: rank(scale_for(absmax, t)) for t in new}
    identity = exact(torch.ones_like(absmax))
    best, top = (float("inf"), identity), float(absmax.amax())
    short = sorted((t for t in known if t < top), key=known.__getitem__)[:keep]
    for t in short:
        if known[t] > known[short[0]] * (1 + margin):
            break
        score = exact(scale_for(absmax, t))
        if score < best[1]:
            best = (t, score)
    curve = (start, *sorted(known.items(), reverse=True))
    return Search(best[0], scale_for(absmax, best[0]), best[1], identity, curve)


def _narrowed(grid: Sequence[float], known: Mapping[float, float], around: int, refine: int = 6) -> list[float]:
    """The grid's points to ask next: ``refine`` evenly spaced ones between each of the best points' neighbours."""
    points, new = sorted(known, reverse=True), dict[float, None]()
    for best in sorted(points, key=known.__getitem__)[:around]:
        at = points.index(best)
        high, low = points[max(at - 1, 0)], points[min(at + 1, len(points) - 1)]
        between = [t for t in grid if low < t < high and t not in known]
        number = min(refine, len(between))
        new |= dict.fromkeys(between[int((i + 0.5) * len(between) / number)] for i in range(number))
    return list(new)
