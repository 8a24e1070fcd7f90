"""Outlier Suppression+ (arXiv 2304.09145): channel shift by the midpoint, channel scale by one searched threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor], float]


@dataclass(frozen=True)
class Search:
    """Outcome of a search. threshold: the value behind the scale, inf for s = 1; curve: (threshold, loss) of every
    candidate ranked, in order.
    """

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


def rank_coarse(absmax: Tensor, rank: Loss, every: int = 6) -> list[tuple[float, float]]:
    """(threshold, loss) of s = 1 (threshold inf) and of each ``every``-th threshold of ``fast_grid``, largest first."""
    few = fast_grid(absmax)[::every]
    return [(float("inf"), rank(torch.ones_like(absmax))), *((t, rank(scale_for(absmax, t))) for t in few)]


def search_fast(
    absmax: Tensor,
    rank: Loss,
    exact: Loss,
    coarse: Sequence[tuple[float, float]] = (),
    grid: Sequence[float] | None = None,
    keep: int = 16,
    slack: float = 0.05,
) -> Search:
    """``ranked_search`` of a grid's thresholds (default: ``fast_grid``); coarse: losses that ``rank_coarse`` found."""
    thresholds = [t for t in (fast_grid(absmax) if grid is None else grid) if t < float(absmax.amax())]
    return ranked_search(thresholds, lambda t: scale_for(absmax, t), rank, exact, dict(coarse), keep, slack)


def ranked_search(
    values: Sequence[float],
    scale_of: Callable[[float], Tensor],
    rank: Loss,
    exact: Loss,
    known: Mapping[float, float] | None = None,
    keep: int = 16,
    slack: float = 0.05,
    jag: float = 1.0,
) -> Search:
    """Rank the candidates, score the best ranked exactly.

    values: one number a candidate, in their order, of which ``scale_of`` makes its scale; inf is s = 1. rank, exact:
    the same objective on few and on many rows. known: ranks that are known. Every second candidate is ranked, and each
    between them that has a neighbour within ``jag`` of the best (losses are jagged: real neighbours differ by up to
    15 %). At most ``keep`` are scored beside s = 1; after three, those ranked so far back that to win they would have
    to beat their rank by ``slack`` more than any did yet are left out. The scale returned is never worse than s = 1 on
    ``exact``.
    """
    ones = torch.ones_like(scale_of(values[0])) if values else scale_of(float("inf"))
    ranks = {**(known or {})}

    def ask(value: float) -> float:
        if value not in ranks:
            ranks[value] = rank(ones if value == float("inf") else scale_of(value))
        return ranks[value]

    ask(float("inf"))
    good = min((ask(value) for value in values[::2]), default=0.0) * (1 + jag)
    for before, value, after in zip(values[::2], values[1::2], [*values[2::2], None], strict=False):
        if ask(before) <= good or (after is not None and ask(after) <= good):
            ask(value)
    identity = exact(ones)
    best, luck, scored = (float("inf"), identity), float("inf"), 0
    leaders = best_of_runs([value for value in values if value in ranks], ranks)
    for value in sorted((v for v in values if v in ranks), key=lambda v: (v not in leaders, ranks[v])):
        if scored == keep:
            break
        if scored >= 3 and ranks[value] * luck * (1 - slack) > best[1]:
            continue
        score, scored = exact(scale_of(value)), scored + 1
        luck = min(luck, score / max(ranks[value], 1e-30))
        if score < best[1]:
            best = (value, score)
    scale = ones if best[0] == float("inf") else scale_of(best[0])
    return Search(best[0], scale, best[1], identity, tuple(sorted(ranks.items(), reverse=True)))


def best_of_runs(values: Sequence[float], ranks: Mapping[float, float], equal: float = 0.01) -> set[float]:
    """The best ranked of each run of neighbours that differ by less than ``equal`` of their rank, one to the next."""
    leaders: list[float] = []
    for before, value in zip([None, *values], values, strict=False):
        if before is None or abs(ranks[value] - ranks[before]) > equal * ranks[before]:
            leaders.append(value)
        elif ranks[value] < ranks[leaders[-1]]:
            leaders[-1] = value
    return set(leaders)
