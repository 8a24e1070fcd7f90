"""AWQ (arXiv 2306.00978): channels that carry much activation get finer weights, by one searched power."""

from __future__ import annotations

from torch import Tensor

from calib.solvers.os_plus import Loss, Search, ranked_search

POWERS = [k / 20 for k in range(1, 21)]


def awq_scale(mean: Tensor, power: float) -> Tensor:
    """Eq. 5: s_j = mean_j^power, mean [n] of the channel's magnitude, over the geometric mean of its extremes."""
    s = mean.clamp(min=1e-4).pow(power)
    return s / (s.amax() * s.amin()).sqrt()


def search_power(mean: Tensor, rank: Loss, exact: Loss) -> Search:
    """The power among 0 (s = 1) and ``POWERS`` with the least error; ``threshold`` holds it, inf for s = 1."""
    return ranked_search(POWERS, lambda power: awq_scale(mean, power), rank, exact, jag=float("inf"))
