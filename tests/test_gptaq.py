"""Rounding against quantized inputs, AWQ's powers, and both through the engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import calib
from calib.errors import InputError, NumericsError
from calib.quantizers import AffineSpec
from calib.recipe import recipe, scheme
from calib.solvers import awq_scale, gptq, search_power
from calib.solvers.awq import POWERS
from calib.solvers.gptq import Pairs, towards
from tests.families import batches, build, logits

SPEC = AffineSpec(4)


def pair(seed: int, rows: int = 200, n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Float rows, what a coarse grid and a drift upstream make of them, and a weight."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g) @ torch.randn(n, n, generator=g)
    moved = x @ (torch.eye(n) + 0.05 * torch.randn(n, n, generator=g))
    return x, (moved / 2).round() * 2, torch.randn(16, n, generator=g)


def pairs(x: Tensor, got: Tensor) -> Pairs:
    return Pairs(x.T @ got, len(got), float((x - got).square().sum()))


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_with_many_rows_the_target_weight_is_the_least_squares_one(seed: int) -> None:
    x, got, w = pair(seed, rows=20_000)
    found = towards(w, got.T @ got, pairs(x, got), ridge=1e-9)
    best = torch.linalg.lstsq(got.double(), (x @ w.T).double()).solution.T
    assert torch.allclose(found.double(), best, atol=1e-2 * float(best.abs().max()))
    error = ((x @ w.T) - got @ found.T).square().sum()
    assert error <= ((x @ w.T) - got @ w.T).square().sum() * (1 + 1e-5)


def test_drift_that_is_noise_is_not_learned() -> None:
    """Few rows explain noise by chance: what they explain is taken back."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(60, 24, generator=g), torch.randn(16, 24, generator=g)
    got = x + 0.3 * torch.randn(60, 24, generator=g)
    known = pairs(x - (x - got) @ torch.eye(24), x)  # a drift independent of the rows it is regressed on
    moved = towards(w, x.T @ x, Pairs(got.T @ x, known.count, known.drift), ridge=1e-6)
    free = w + w @ ((got.T @ x) - x.T @ x) @ torch.linalg.inv(x.T @ x)
    assert float((moved - w).norm()) < 0.35 * float((free - w).norm())


def test_equal_inputs_leave_gptq_as_it_is() -> None:
    x, _, w = pair(0)
    gram = x.T @ x
    assert torch.equal(towards(w, gram, pairs(x, x)), w)
    for a, b in zip(gptq(w, gram, SPEC), gptq(w, gram, SPEC, pairs=pairs(x, x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(5))
def test_paired_rounding_beats_plain_rounding_on_quantized_inputs(seed: int) -> None:
    x, got, w = pair(seed, rows=2000)
    gram, want = got.T @ got, x @ w.T
    errors = []
    for known in (None, pairs(x, got)):
        codes, scale, _ = gptq(w, gram, SPEC, pairs=known)
        errors.append(float((want - got @ (codes * scale).T).square().sum()))
    assert errors[1] < 0.95 * errors[0]


def test_rows_that_say_nothing_are_refused_or_harmless() -> None:
    _, _, w = pair(0)
    zero = torch.zeros(24, 24)
    assert torch.isfinite(towards(w, zero, Pairs(zero, 0, 0.0))).all()
    with pytest.raises(NumericsError):
        towards(w, zero, Pairs(torch.full_like(zero, torch.nan), 10, 1.0))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_awq_takes_the_best_power_and_is_never_worse_than_none(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mean = torch.rand(32, generator=g) * 10 + 1e-3
    table = {power: float(torch.rand((), generator=g)) for power in POWERS}
    scales = {float(awq_scale(mean, power).sum()): value for power, value in table.items()}

    def loss(scale: Tensor) -> float:
        return scales.get(float(scale.sum()), 0.5)

    found = search_power(mean, loss, loss)
    assert found.loss == min(0.5, *table.values()) and found.identity_loss == 0.5
    s = awq_scale(mean, 0.5)
    assert float(s.amax() * s.amin()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "mixtral", "bart"])
def test_in_the_engine_the_output_comes_nearer(family: str) -> None:
    data, fresh = batches(family, 12, rows=8), batches(family, 4, rows=8, seed=7)
    want = torch.cat([logits(build(family), batch) for batch in fresh])
    errors = {}
    for method in ("gptq", "gptaq"):
        result = calib.quantize(build(family), "w4a8-static", method, data, prefix="none", progress=False)
        got = torch.cat([logits(result.model, batch) for batch in fresh])
        errors[method] = float((got - want).norm())
    assert errors["gptaq"] < errors["gptq"], errors


def test_an_expert_that_some_batches_do_not_reach() -> None:
    """Few tokens a batch leave experts out: those batches say nothing of them."""
    data = batches("mixtral", 12, rows=1, length=3)
    result = calib.quantize(build("mixtral"), "w4a8-static", "gptaq", data, batch_size=1, progress=False)
    assert all(torch.isfinite(logits(result.model, batch)).all() for batch in data)


def test_awq_and_gptaq_are_methods_with_clear_limits() -> None:
    assert recipe(scheme("w4a16"), "awq,gptaq").methods == ("awq", "gptaq")
    with pytest.raises(InputError, match="gptaq takes no value"):
        recipe(scheme("w4a16"), "gptaq:3")
