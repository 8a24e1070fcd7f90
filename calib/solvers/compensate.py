"""Low-rank terms that make up for a rounded weight's error: y = Q(W) x + B A x, rank r.

All but LoftQ are bases of the error E = W - Q(W) under a metric on inputs (basis.py): LQER and LoRC (arXiv 2402.02446,
2303.08302) I, L2QER (arXiv 2402.02446) diag E|x|^2, QERA-approx and QERA-exact (arXiv 2410.06040) diag E[x^2] and
E[x x^T]; the last is optimal for the output error. LoftQ (arXiv 2310.08659) alternates rounding and SVD, without data.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, ones

from calib.errors import InputError
from calib.solvers.basis import Bases, InputStatistics, bases

COMPENSATIONS = ("qera", "qera-approx", "l2qer", "lqer", "loftq")


def error_bases(variant: str, error: Tensor, statistics: InputStatistics) -> Bases:
    """Bases of error [out, in] under a variant's metric; their ``factors(rank)`` are B [out, r] and A [r, in]."""
    if variant == "l2qer":
        scale = statistics.absmean.double().clamp(min=1e-4)
        return bases(error, (scale.square() / (scale.min() * scale.max())))
    metrics = {"qera": "whitened", "qera-approx": "rms", "lqer": "svd"}
    if variant not in metrics:
        raise InputError(f"unknown compensation {variant!r}", f"use {', '.join(COMPENSATIONS)}")
    return bases(error, statistics.metric(metrics[variant]))


def loftq(weight: Tensor, rounded: Callable[[Tensor], Tensor], rank: int, rounds: int = 3) -> tuple[Tensor, Bases]:
    """What is to be rounded in the place of weight [out, in], and the bases of what is missing then.

    rounded: a weight -> the values its codes stand for.
    """
    target = weight
    identity = ones(weight.shape[1])
    for _ in range(rounds - 1):
        b, a = bases(weight - rounded(target), identity).factors(rank)
        target = weight - (b @ a).to(weight.dtype)
    return target, bases(weight - rounded(target), identity)
