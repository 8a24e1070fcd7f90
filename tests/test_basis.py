"""Basis selection and error compensation against float64 references written with roots and inverses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import InputError, NumericsError
from calib.quantizers import AffineSpec, decode, encode, qparams, weight_range
from calib.solvers import (
    InputStatistics,
    bases,
    choose_ranks,
    error_bases,
    evened,
    loftq,
    refit,
    svd_llm_bases,
    uniform_ranks,
)


def draw(seed: int, out: int, n: int, rows: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with a correlated, uneven spectrum."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    x = torch.randn(rows, n, generator=g, dtype=torch.float64) @ mix.T
    return torch.randn(out, n, generator=g, dtype=torch.float64), x


def statistics(x: Tensor) -> InputStatistics:
    return InputStatistics(x.T @ x / len(x), x.abs().mean(0))


def loss(w: Tensor, approx: Tensor, x: Tensor) -> float:
    return float(((w - approx) @ x.T).square().sum() / len(x))


def by_root(w: Tensor, h: Tensor, rank: int) -> Tensor:
    """T_r(W H^1/2) H^-1/2, as the papers write it."""
    values, vectors = torch.linalg.eigh(h)
    root = vectors @ values.clamp(min=1e-12).sqrt().diag() @ vectors.T
    u, s, vt = torch.linalg.svd(w @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)


SHAPES = st.tuples(st.integers(2, 14), st.integers(2, 14), st.integers(1, 40), st.integers(0, 10**6))


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_full_rank_is_the_weight_and_dropped_energy_is_the_loss(case: tuple[int, int, int, int]) -> None:
    out, n, rows, seed = case
    w, x = draw(seed, out, n, rows)
    found = bases(w, statistics(x).gram)
    full = min(out, n)
    for rank in range(1, full + 1):
        b, a = found.factors(rank)
        whole = loss(w, torch.zeros_like(w), x)
        assert loss(w, b @ a, x) == pytest.approx(float(found.energy[rank:].sum()), rel=1e-3, abs=1e-6 * whole)
    b, a = found.factors(full)
    assert torch.allclose(b @ a, w, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 10**6))
def test_projection_is_the_published_whitening(out: int, n: int, seed: int) -> None:
    w, x = draw(seed, out, n, 60)
    h = statistics(x).gram
    for rank in range(1, min(out, n)):
        b, a = bases(w, h).factors(rank)
        c, d = svd_llm_bases(w, h).factors(rank)
        best = loss(w, by_root(w, h, rank), x)
        assert loss(w, b @ a, x) == pytest.approx(best, rel=1e-5, abs=1e-9)
        assert loss(w, c @ d, x) == pytest.approx(best, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("variant", ["svd", "asvd", "rms", "fwsvd"])
def test_diagonal_metrics_are_column_scaling(variant: str) -> None:
    w, x = draw(5, 9, 12, 50)
    fisher = torch.rand(12, dtype=torch.float64) + 0.1
    known = InputStatistics(x.T @ x / 50, x.abs().mean(0), fisher)
    scale = {
        "svd": torch.ones(12, dtype=torch.float64),
        "asvd": (x.abs().mean(0) + 1e-6).sqrt(),
        "rms": x.square().mean(0).sqrt(),
        "fwsvd": fisher.sqrt(),
    }[variant]
    u, s, vt = torch.linalg.svd(w * scale, full_matrices=False)
    b, a = bases(w, known.metric(variant)).factors(4)
    assert torch.allclose(b @ a, (u[:, :4] * s[:4]) @ vt[:4] / scale, atol=1e-6)


def test_fwsvd_without_gradients_is_refused() -> None:
    with pytest.raises(InputError, match="fwsvd"):
        InputStatistics(torch.eye(3), torch.ones(3)).metric("fwsvd")


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_rank_deficient_gram_gives_finite_bases(rows: int) -> None:
    w, x = draw(2, 8, 12, max(rows, 1))
    h = x.T @ x if rows else torch.zeros(12, 12, dtype=torch.float64)
    for found in (bases(w, h), svd_llm_bases(w, h)):
        for rank in (1, 4, 8):
            b, a = found.factors(rank)
            assert torch.isfinite(b).all() and torch.isfinite(a).all()
            assert (b @ a).norm() <= 20 * w.norm()
    b, a = bases(w, h).factors(max(rows, 1))
    assert loss(w, b @ a, x) <= 1e-8 * loss(w, 0 * w, x) or rows == 0  # so many directions are all there are
    b, a = bases(w, h).factors(8)
    assert torch.allclose(b @ a, w, atol=1e-6)


def test_nan_is_named() -> None:
    w, x = draw(0, 4, 5, 9)
    h = x.T @ x
    bad = w.clone()
    bad[0, 0] = float("nan")
    for weight, gram in ((bad, h), (w, h * float("inf"))):
        for solve in (bases, svd_llm_bases):
            with pytest.raises(NumericsError, match="NaN or inf"):
                solve(weight, gram)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_refit_reproduces_the_bases_on_its_own_inputs_and_beats_them_on_others(seed: int) -> None:
    w, x = draw(seed, 8, 12, 80)
    noisy = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h, moved = x.T @ x / 80, noisy.T @ noisy / 80
    b, a = bases(w, h).factors(5)
    assert torch.allclose(refit(w, a, h, h) @ a, b @ a, atol=1e-4)
    b, a = bases(w, moved).factors(5)
    c = refit(w, a, moved, x.T @ noisy / 80)

    def error(up: Tensor) -> float:
        return float((x @ w.T - noisy @ a.T @ up.T).square().sum())

    assert error(c) <= error(b) * (1 + 1e-9)


def test_ranks_are_the_best_under_the_budget() -> None:
    """Against all choices, on layers small enough for that."""
    g = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (4, 9), (8, 3)]
    energies = [torch.rand(min(s), generator=g).sort(descending=True).values ** 3 for s in shapes]
    weights = [1.0, 2.0, 0.5]
    options = []  # rank, cost, kept energy
    for (out, n), energy, weight in zip(shapes, energies, weights, strict=True):
        total = float(energy.sum())
        kept = [weight * total * math.log(float(energy[:r].sum()) / total) for r in range(1, len(energy) + 1)]
        low = [(r, r * (out + n), kept[r - 1]) for r in range(1, len(energy) + 1)]
        dense = (None, out * n, 0.0)
        options.append([option for option in low if option[1] < out * n] + [dense])
    for budget in range(40, 97, 4):
        ranks = choose_ranks(shapes, energies, weights, budget)
        chosen = [next(o for o in layer if o[0] == r) for layer, r in zip(options, ranks, strict=True)]
        spent, got = sum(o[1] for o in chosen), sum(o[2] for o in chosen)
        assert spent <= budget
        best = max(sum(o[2] for o in c) for c in itertools.product(*options) if sum(o[1] for o in c) <= budget)
        step = max(layer[1][2] - layer[0][2] for layer in options)
        assert got >= best - step  # the last step is all that greed can miss
    assert choose_ranks(shapes, energies, weights, sum(o * n for o, n in shapes)) == [None] * 3
    with pytest.raises(InputError, match="one basis a layer"):
        choose_ranks(shapes, energies, weights, 20)


@given(st.integers(0, 999), st.floats(0.2, 0.95), st.floats(0, 1))
@example(122, 0.5, 0.02)
def test_evened_ranks_lie_between_and_cost_no_more(seed: int, keep: float, even: float) -> None:
    g = torch.Generator().manual_seed(seed)
    shapes = [(int(o), int(n)) for o, n in torch.randint(16, 90, (5, 2), generator=g).tolist()]
    energies = [torch.rand(min(s), generator=g).sort(descending=True).values for s in shapes]
    budget = keep * sum(o * n for o, n in shapes)
    chosen = choose_ranks(shapes, energies, [1.0] * 5, budget)
    flat = uniform_ranks(shapes, keep)
    found = evened(shapes, chosen, keep, even)
    assert sum(o * n if r is None else r * (o + n) for r, (o, n) in zip(found, shapes, strict=True)) <= budget + 1e-6
    assert evened(shapes, chosen, keep, 0.0) == chosen and evened(shapes, chosen, keep, 1.0) == flat
    for (o, n), a, b, r in zip(shapes, chosen, flat, found, strict=True):
        whole = o * n / (o + n)
        low, high = sorted(whole if x is None else float(x) for x in (a, b))
        assert int(low) <= (whole if r is None else r) <= high + 1e-9


def test_uniform_ranks_keep_their_share() -> None:
    assert uniform_ranks([(100, 100), (50, 200)], 0.5) == [25, 20]
    assert uniform_ranks([(100, 100)], 1.0) == [None]


def test_compensation_is_ordered_and_qera_is_the_optimum() -> None:
    w, x = draw(3, 24, 32, 200)
    scale = torch.logspace(1, -1, 32, dtype=torch.float64)
    x = x * scale
    spec = AffineSpec(3, granularity="channel")
    step, zero = qparams(*weight_range(w.float(), spec), spec)
    q = decode(encode(w.float(), step, zero, spec), step, zero, spec).double()
    known = statistics(x)

    def after(variant: str) -> float:
        b, a = error_bases(variant, w - q, known).factors(6)
        return loss(w - q, b @ a, x)

    assert after("qera") < after("l2qer") < after("lqer") < loss(w, q, x)
    assert after("qera") == pytest.approx(loss(w - q, by_root(w - q, known.gram, 6), x), rel=1e-5)
    u, s, vt = torch.linalg.svd((w - q) * x.abs().mean(0).clamp(min=1e-4), full_matrices=False)
    reference = (u[:, :6] * s[:6]) @ vt[:6] / x.abs().mean(0).clamp(min=1e-4)
    assert after("l2qer") == pytest.approx(loss(w - q, reference, x), rel=1e-5)


def test_loftq_alternates_rounding_and_svd() -> None:
    w = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double()
    spec = AffineSpec(2, granularity="channel")

    def rounded(weight: Tensor) -> Tensor:
        step, zero = qparams(*weight_range(weight.float(), spec), spec)
        return decode(encode(weight.float(), step, zero, spec), step, zero, spec).double()

    c = torch.zeros_like(w)
    for _ in range(3):  # C0 = 0; Q_t = Q(W - C_t-1); C_t = T_r(W - Q_t)
        q = rounded(w - c)
        u, s, vt = torch.linalg.svd(w - q)
        c = (u[:, :4] * s[:4]) @ vt[:4]
    target, found = loftq(w, rounded, 4)
    b, a = found.factors(4)
    assert torch.allclose(rounded(target), q)
    assert torch.allclose(b @ a, c, atol=1e-6)
    with pytest.raises(InputError, match="compensation"):
        error_bases("magic", w, InputStatistics(torch.eye(16), torch.ones(16)))
