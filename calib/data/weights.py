"""The mathematics of the choice: importance weights, their temperature, and the noise that draws by them."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from calib.data.features import Array, mix

SMOOTHING = 0.5  # Laplace


def log_ratio(target: Array, pool: Array) -> Array:
    """log p_target - log p_pool of each bucket, float64, from counts with Laplace smoothing."""
    p, q = (np.log(bag + SMOOTHING) - np.log(bag.sum() + SMOOTHING * len(bag)) for bag in (target, pool))
    return np.asarray(p - q)


def divergence(target: Array, other: Array) -> float:
    """Kullback-Leibler divergence, nats, of two smoothed bags."""
    p = (target + SMOOTHING) / (target.sum() + SMOOTHING * len(target))
    return float((p * log_ratio(target, other)).sum())


def effective_size(scores: Array, mass: Array, tau: float) -> float:
    """(sum m w)^2 / sum m w^2 for w = exp(tau * score): tokens, or texts for m = 1, that the weights rest on."""
    weights = np.exp(tau * (scores - scores.max()))
    return float((mass * weights).sum() ** 2 / (mass * weights**2).sum())


def temperature(scores: Array, mass: Array, wanted: float) -> tuple[float, float]:
    """The tau whose effective size is `wanted`, and that size; the nearest there is where none is."""

    def excess(tau: float) -> float:
        return float(np.log(effective_size(scores, mass, tau) / wanted))

    high = 1.0
    while excess(high) > 0 and high < 2**30:
        high *= 2
    tau = 0.0 if excess(0.0) <= 0 else high if excess(high) > 0 else float(brentq(excess, 0.0, high, xtol=1e-12))
    return tau, effective_size(scores, mass, tau)


def gumbel(hashes: Array, seed: int, stream: int = 0) -> Array:
    """Standard Gumbel noise, float64, that depends on a text's hash, the seed and the stream alone."""
    with np.errstate(over="ignore"):
        key = mix(np.array([seed, stream], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        bits = mix(mix(hashes ^ key[0]) ^ mix(key[1:])[0]) >> np.uint64(11)
    return np.asarray(-np.log(-np.log((bits.astype(np.float64) + 0.5) / 2.0**53)))
