"""How sure a figure is, and whether two models differ: bootstrap intervals and paired tests on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from calib.errors import InputError
from calib.evaluate.result import Result

RESAMPLES, RANK_RESAMPLES = 9999, 999  # Spearman's correlation is slow to redo
Array = NDArray[np.float64]


def bootstrap95(result: Result, seed: int = 0) -> tuple[float, float] | None:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) of a result's value over its items; None where
    they do not vary, or are fewer than 3."""
    return _interval(_parts(result), _statistic(result), seed, result.task)


def paired(result: Result, other: Result, seed: int = 0) -> dict[str, Any]:
    """``difference`` of two results on the same items, its bootstrap ``ci95``, and ``p``: of a permutation test that
    swaps the models item by item, for classification McNemar's exact test on the items that one alone gets right.

    Of perplexities it is the difference of mean losses, in nats. Raises InputError where the items differ.
    """
    mine, others = _parts(result), _parts(other)
    if result.task != other.task or result.n != other.n:
        raise InputError(f"{result.n} items of {result.task} cannot be paired with {other.n}", "use the same data")
    if result.task == "similarity":
        (a, scores), (b, _) = mine, others

        def apart(x: Array, y: Array, z: Array) -> float:
            return _spearman(x, z) - _spearman(y, z)

        p = stats.permutation_test(
            (a, b),
            lambda x, y: apart(x, y, scores),
            permutation_type="samples",
            n_resamples=RANK_RESAMPLES,
            rng=np.random.default_rng(seed),
        ).pvalue
        ci95 = _interval((a, b, scores), apart, seed, result.task)
        return {"difference": apart(a, b, scores), "ci95": ci95, "p": float(p), "test": "permutation of pairs"}
    a, b = mine[0], others[0]
    ci95 = _interval((a - b,), _mean, seed, result.task)
    found: dict[str, Any] = {"difference": float((a - b).mean()), "ci95": ci95}
    if result.task == "classification":
        won, lost = int((a > b).sum()), int((a < b).sum())
        p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        return {**found, "p": float(p), "test": "McNemar, exact", "won": won, "lost": lost}
    p = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    ).pvalue
    return {**found, "p": float(p), "test": "permutation of items"}


def _parts(result: Result) -> Sequence[Array]:
    """What a result's value is computed from, item by item."""
    assert result.outputs is not None
    outputs = result.outputs.double().numpy()
    if result.task == "classification":
        assert result.truth is not None
        return ((outputs.argmax(1) == result.truth.numpy()).astype(np.float64),)
    if result.task == "similarity":
        assert result.truth is not None
        return outputs, result.truth.double().numpy()
    return (outputs,)


def _statistic(result: Result) -> Any:
    if result.task == "similarity":
        return _spearman
    return (lambda x, axis=-1: np.exp(np.mean(x, axis=axis))) if result.task == "perplexity" else _mean


def _mean(x: Array, axis: int = -1) -> Any:
    return np.mean(x, axis=axis)


def _spearman(x: Array, y: Array) -> float:
    return float(stats.spearmanr(x, y).statistic)


def _interval(parts: Sequence[Array], statistic: Any, seed: int, task: str) -> tuple[float, float] | None:
    if len(parts[0]) < 3 or all(np.ptp(part) == 0 for part in parts):
        return None
    slow = task == "similarity"
    found = stats.bootstrap(
        tuple(parts),
        statistic,
        paired=len(parts) > 1,
        vectorized=not slow,
        n_resamples=RANK_RESAMPLES if slow else RESAMPLES,
        method="percentile" if slow else "BCa",  # acceleration would take a correlation for each item left out
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
