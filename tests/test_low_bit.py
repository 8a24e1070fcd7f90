"""Low-bit grids: published errors, goldens of values and gradients, exact packing, searches that never do worse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import InputError, NumericsError
from calib.nn import ActivationQuantizer, QuantLinear, int4
from calib.quantizers import (
    AffineSpec,
    AnyWeight,
    DualBinarySpec,
    LevelSpec,
    describe_weight,
    grouped,
    pack,
    pack_trits,
    straight,
    unpack,
    unpack_trits,
    weight_spec,
)
from calib.solvers import allocate, bias_correction, gptq, rounded, weight_params
from calib.solvers.dual_binary import _alternate
from calib.solvers.levels import RATIOS, published_scale

few = settings(max_examples=40, deadline=None)
KINDS = [("seq", 3), ("seq", 4), ("seq", 8), ("seq", 16), ("lsq", 4), ("lsq", 8), ("lsq", 16), ("binary", 2)]
TERNARY = [("tbt", 3), ("twn", 3), ("absmean", 3)]


def every(**fixed: object) -> list[AnyWeight]:
    searched = [LevelSpec(kind=k, levels=n, **fixed) for k, n in KINDS]  # type: ignore[arg-type]
    statistic = [LevelSpec(kind=k, levels=n, **{**fixed, "range": "published"}) for k, n in TERNARY]  # type: ignore[arg-type]
    return [*searched, *statistic, DualBinarySpec(**fixed)]  # type: ignore[arg-type]


def rows(kind: str, count: int = 512, n: int = 1024) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "gaussian":
        return torch.randn(count, n, generator=generator)
    u = torch.rand(count, n, generator=generator) - 0.5
    return 2 * u if kind == "uniform" else -u.sign() * torch.log1p(-2 * u.abs())


def error(weight: Tensor, spec: AnyWeight) -> float:
    codes, *params = rounded(weight, spec)
    return float((spec.decode(codes, *params) - weight).square().sum() / weight.square().sum())


PUBLISHED = {  # relative squared errors of 2048 x 1024 rows: gaussian, laplace, uniform
    ("binary", 2): (0.364, 0.500, 0.249),
    ("tbt", 3): (0.1996, 0.315, 0.1110),
    ("twn", 3): (0.1916, 0.282, 0.1113),
    ("absmean", 3): (0.264, 0.393, 0.156),
}


@pytest.mark.parametrize(("kind", "count"), PUBLISHED)
def test_statistic_scales_have_the_noted_errors(kind: str, count: int) -> None:
    spec = LevelSpec(kind=kind, levels=count, range="published")  # type: ignore[arg-type]
    for name, want in zip(("gaussian", "laplace", "uniform"), PUBLISHED[kind, count], strict=True):
        assert error(rows(name), spec) == pytest.approx(want, rel=0.03)


SEARCHED = {  # the published scale (of gaussian rows only: the largest of Laplace rows varies), one best ratio for all
    ("seq", 3): (0.431, 0.195, 0.272),
    ("seq", 4): (0.254, 0.122, 0.205),
    ("lsq", 4): (0.757, 0.152, 0.213),
    ("seq", 8): (0.063, 0.0388, 0.0752),
    ("lsq", 8): (0.112, 0.0419, 0.0747),
    ("seq", 16): (0.0158, 0.0119, 0.0257),
    ("lsq", 16): (0.0205, 0.0122, 0.0255),
}


@pytest.mark.parametrize(("kind", "count"), SEARCHED)
def test_searched_scales_have_the_noted_errors_and_row_by_row_are_better(kind: str, count: int) -> None:
    plain, *wanted = SEARCHED[kind, count]
    spec = LevelSpec(kind=kind, levels=count)  # type: ignore[arg-type]
    assert error(rows("gaussian", 2048), spec.with_(range="published")) == pytest.approx(plain, rel=0.03)
    for name, want in zip(("gaussian", "laplace"), wanted, strict=True):
        weight = rows(name)
        scale = published_scale(weight, spec)
        values = (spec.decode(spec.encode(weight, scale * r), scale * r) for r in RATIOS)
        one = min(float((v - weight).square().sum() / weight.square().sum()) for v in values)
        assert one == pytest.approx(want, rel=0.03)
        assert error(weight, spec) < one


def test_dual_binarization_has_the_noted_errors_and_a_free_sign_is_better() -> None:
    start, searched = (
        DualBinarySpec(granularity="group", group_size=64, range="published"),
        DualBinarySpec(granularity="group", group_size=64),
    )
    for name, first, least in (("gaussian", 0.1695, 0.1315), ("laplace", 0.236, 0.1745), ("uniform", 0.110, 0.0865)):
        weight = rows(name)
        assert error(weight, start) == pytest.approx(first, rel=0.03)
        view = grouped(weight, searched)
        _, left = _alternate(view, view.abs().amax(-1, keepdim=True), torch.ones(16, 64))
        assert float(left.sum() / weight.square().sum()) == pytest.approx(least, rel=0.03)
        assert error(weight, searched) < least
    scale, _ = weight_params(rows("laplace"), searched)
    a1, a2 = scale.float().unbind(-1)
    sign = a1.sign()
    assert bool(((sign * a2 < 0) & (sign * (a1 + a2) > 0)).all()), "a2 < 0 < a1 + a2, or its mirror image"
    assert 0.2 < float((sign > 0).float().mean()) < 0.8


@few
@given(st.sampled_from(every()), st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 90))
def test_codes_survive_packing_and_decoding(spec: AnyWeight, seed: int, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) * (torch.rand(m, 1, generator=generator) > 0.2)
    codes, *params = rounded(weight, spec)
    words = spec.pack(codes)
    assert words.dtype == torch.int32 and words.shape == (m, spec.words(n))
    assert torch.equal(spec.unpack(words, n), codes)
    values = spec.decode(codes, *params)
    assert bool((values[weight.abs().amax(1) == 0] == 0).all()), "rows of zeros stay zeros"
    assert torch.equal(spec.decode(spec.encode(values, *params), *params), values), "levels are fixed points"
    assert weight_spec(describe_weight(spec)) == spec


@few
@given(st.integers(1, 8), st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 150))
def test_every_width_survives_packing(bits: int, seed: int, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (m, n), dtype=torch.int8, generator=generator)
    assert torch.equal(unpack(pack(codes, bits), bits, n), codes)
    trits = torch.randint(-1, 2, (m, n), dtype=torch.int8, generator=generator)
    words = pack_trits(trits)
    assert words.shape == (m, math.ceil(math.ceil(n / 5) / 4)) and torch.equal(unpack_trits(words, n), trits)


def test_packing_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(InputError, match=r"-1\.\.1"):
        pack_trits(torch.tensor([[2]], dtype=torch.int8))
    with pytest.raises(InputError, match="cannot pack 9 bits"):
        pack(torch.zeros(1, 1, dtype=torch.int8), 9)


def test_zero_maps_to_plus_one_without_a_zero_level() -> None:
    weight = torch.tensor([[0.0, -0.0, -1.0, 1.0]])
    for spec in (LevelSpec(kind="binary", levels=2), LevelSpec(kind="seq", levels=4)):
        codes, *params = rounded(weight, spec)
        values = spec.decode(codes, *params)
        assert bool((values[0, :2] > 0).all()) and values[0, 2] == -values[0, 3]
    assert straight.elastic_binary(weight, torch.ones(1, 1))[0, :2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("spec", every(granularity="group", group_size=8), ids=str)
def test_odd_rows_are_handled(spec: AnyWeight) -> None:
    single = torch.full((2, 16), 0.25)
    codes, *params = rounded(single, spec)
    assert torch.allclose(spec.decode(codes, *params), single, rtol=0.35)
    with pytest.raises(InputError, match="does not divide 20"):
        rounded(torch.ones(2, 20), spec)
    with pytest.raises(NumericsError, match="NaN"):
        rounded(torch.full((1, 8), torch.nan), spec)
    with pytest.raises(NumericsError, match="fp16"):
        rounded(torch.full((1, 8), 3e6), spec)


def test_specs_refuse_what_is_no_grid() -> None:
    for wrong in (
        {"kind": "seq", "levels": 5},
        {"kind": "tbt", "levels": 3, "range": "mse"},
        {"kind": "nose", "levels": 2},
        {"kind": "seq", "levels": 4, "granularity": "group"},
    ):
        with pytest.raises(InputError):
            LevelSpec(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", every(granularity="group", group_size=16), ids=str)
def test_feedback_through_any_grid_lowers_the_output_error(spec: AnyWeight) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    x = torch.randn(512, 64, generator=generator) @ mix
    weight, gram = torch.randn(48, 64, generator=generator), x.T @ x
    importance = gram.diagonal() / len(x)
    codes, *params = rounded(weight, spec, importance)
    plain = spec.decode(codes, *params)
    codes, *params = gptq(weight, gram, spec)
    fed = spec.decode(codes, *params)
    loss = [float(((w - weight) @ gram * (w - weight)).sum()) for w in (plain, fed)]
    assert loss[1] < 0.9 * loss[0]


def test_importance_decides_between_columns() -> None:
    weight = torch.randn(64, 64)
    light, heavy = torch.ones(64), torch.cat([torch.full((8,), 100.0), torch.ones(56)])
    for spec in (LevelSpec(kind="seq", levels=4), LevelSpec(kind="binary", levels=2), DualBinarySpec()):
        left = []
        for importance in (light, heavy):
            codes, *params = rounded(weight, spec, importance)
            left.append(float(((spec.decode(codes, *params) - weight).square() * heavy).sum()))
        assert left[1] < 0.98 * left[0]
    with pytest.raises(InputError, match="one value an input"):
        rounded(weight, DualBinarySpec(), torch.ones(3))


def test_bias_correction_is_the_least_squares_bias_of_rows_that_weigh_alike() -> None:
    x = torch.randn(256, 32) + torch.randn(32)
    x[0] *= 1000  # a massive token
    weight = torch.randn(8, 32)
    spec = LevelSpec(kind="seq", levels=4)
    codes, *params = rounded(weight, spec)
    values = spec.decode(codes, *params)
    bias = bias_correction(weight, values, x)

    size = (x @ weight.T).double().norm(dim=1, keepdim=True)  # numpy's solver on rows divided by their output's norm
    left = (x.double() @ (weight - values).double().T) / size
    golden, *_ = np.linalg.lstsq((1 / size).numpy(), left.numpy())
    assert np.allclose(bias.numpy(), golden[0], atol=1e-9)

    ordinary = x[1:] @ (weight - values).T
    assert (ordinary - bias.float()).norm() < 0.95 * ordinary.norm()
    assert (ordinary - (x @ (weight - values).T).mean(0)).norm() > 2 * ordinary.norm()  # what a plain mean would do


@pytest.mark.parametrize("inputs", [None, AffineSpec(8, False, "token", dynamic=True)], ids=["a16", "a8"])
@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("kind", range(12))
def test_fake_and_packed_are_the_same_bits(kind: int, granularity: str, inputs: AffineSpec | None) -> None:
    spec = every(granularity=granularity, group_size=16 if granularity == "group" else None)[kind]
    linear = QuantLinear.from_float(torch.randn(33, 48), torch.randn(33), spec, ActivationQuantizer(inputs, 48))
    for x in (torch.randn(1, 48), torch.randn(3, 7, 48)):
        fake = linear.set_mode("fake")(x)
        assert torch.equal(linear.set_mode("packed")(x), fake)
        want = linear.input(x).double() @ linear.dequantize().double().T + linear.bias.double()
        assert torch.allclose(fake.double(), want, atol=1e-4)
    stored = sum(t.numel() * t.element_size() for t in (linear.weight_packed, linear.weight_scale))
    assert stored * 8 == pytest.approx(spec.bits_per_weight((33, 48)) * 33 * 48, rel=1e-9)


# Goldens: the published formulas once more, in float64 with loops.


def golden(kind: str, levels: int, w: np.ndarray, a: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, ...]:
    value, grad_w, grad_a = np.zeros_like(w), np.zeros_like(w), np.zeros_like(a)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            q = w[i, j] / a[i, 0]
            if kind == "seq":
                centres = [((2 * cell + 1) / levels - 1) for cell in range(levels)]
                unit = min(centres, key=lambda centre: abs(centre - q))
                inside, beyond, largest = abs(q) <= 0.99, centres[-1] * np.sign(q), 1
            elif kind == "lsq":
                low, high = -levels // 2, levels // 2 - 1
                unit = min(range(low, high + 1), key=lambda level: abs(level - q))
                inside, beyond, largest = low <= q <= high, (low if q < 0 else high), high
            else:
                unit, inside, largest = (1.0 if q >= 0 else -1.0), abs(q) <= 1, 1
                beyond = unit
            value[i, j] = unit * a[i, 0]
            grad_w[i, j] = up[i, j] * inside
            local = unit if kind == "binary" else (unit - q if inside else beyond)
            grad_a[i, 0] += up[i, j] * local / math.sqrt(w.size * largest)
    return value, grad_w, grad_a


@pytest.mark.parametrize(("kind", "levels"), KINDS)
def test_forward_and_gradients_match_the_golden(kind: str, levels: int) -> None:
    w, up = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    a = torch.rand(5, 1, dtype=torch.float64) * (0.4 if kind == "lsq" else 1.5) + 0.2
    w.requires_grad_(), a.requires_grad_()
    made = straight.elastic_binary(w, a) if kind == "binary" else getattr(straight, kind)(w, a, levels)
    made.backward(up)
    assert w.grad is not None and a.grad is not None
    wanted = golden(kind, levels, w.detach().numpy(), a.detach().numpy(), up.numpy())
    for got, want in zip((made.detach(), w.grad, a.grad), wanted, strict=True):
        assert np.allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)


def differences(
    kind: str, levels: int, low: float, high: float, w: Tensor, a: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Central differences of sum(up x surrogate) in w [m, n] and a [m, 1]. The surrogate is what straight-through
    estimation says the grid is around (w, a): codes and clipped elements held, w plus a times the distance, in steps,
    from w to its level; of clipped elements, and of two levels, a times the level."""
    q = w / a
    if kind == "seq":
        cell = ((q.clamp(-0.9999, 0.9999) + 1) / 2 * levels).floor()
        unit, inside = (2 * cell + 1) / levels - 1, q.abs() <= 0.99
    elif kind == "binary":
        unit, inside = torch.where(q < 0, -1.0, 1.0).double(), q.abs() <= 1
    else:
        unit, inside = q.round().clamp(low, high), (q >= low) & (q <= high)

    def surrogate(w_: Tensor, a_: Tensor) -> Tensor:
        if kind == "binary":
            return inside * (w_ - w) + a_ * unit
        return torch.where(inside, w_ + a_ * (unit - q), a_ * unit)

    step = 1e-6
    by_w = up * (surrogate(w + step, a) - surrogate(w - step, a)) / (2 * step)
    by_a = (up * (surrogate(w, a + step) - surrogate(w, a - step))).sum(1, keepdim=True) / (2 * step)
    return by_w, by_a


@pytest.mark.parametrize(
    ("kind", "levels", "ends"), [*((k, n, (-(n // 2), n // 2 - 1)) for k, n in KINDS), ("affine", 4, (-9, 6))]
)
def test_gradients_match_finite_differences_of_the_surrogate(kind: str, levels: int, ends: tuple[int, int]) -> None:
    w, up = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    a = torch.rand(5, 1, dtype=torch.float64) * (0.4 if kind in ("lsq", "affine") else 1.5) + 0.2
    want = differences(kind, levels, *ends, w, a, up)
    w.requires_grad_(), a.requires_grad_()
    if kind == "affine":
        made = straight.affine(w, a, torch.tensor(1), AffineSpec(4, symmetric=False))
    else:
        made = straight.elastic_binary(w, a) if kind == "binary" else getattr(straight, kind)(w, a, levels)
    largest = {"lsq": ends[1], "affine": 7}.get(kind, 1)
    by_w, by_a = torch.autograd.grad(made, (w, a), up)
    assert torch.allclose(by_w, want[0], rtol=1e-7, atol=1e-8)
    assert torch.allclose(by_a * math.sqrt(200 * largest), want[1], rtol=1e-7, atol=1e-7), "over LSQ's gain"


@pytest.mark.parametrize(("kind", "levels"), [k for k in KINDS if k[0] != "lsq" or k[1] > 4])
def test_training_and_rounding_share_their_levels(kind: str, levels: int) -> None:
    weight = torch.randn(6, 64)
    spec = LevelSpec(kind=kind, levels=levels, range="published")  # type: ignore[arg-type]
    scale = published_scale(weight, spec)
    a = scale * {"seq": levels if levels > 3 else 1.5}.get(kind, 1)  # the stored scale holds the factor
    trained = straight.elastic_binary(weight, a) if kind == "binary" else getattr(straight, kind)(weight, a, levels)
    assert torch.allclose(trained, spec.decode(spec.encode(weight, scale), scale), atol=1e-6)


def test_tbt_weights_pass_every_gradient() -> None:
    w, up = torch.randn(4, 30, dtype=torch.float64, requires_grad=True), torch.randn(4, 30, dtype=torch.float64)
    for levels in (2, 3):
        made = straight.tbt(w, levels)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(made, w, up)
        assert torch.equal(grad, up)
        for i in range(4):
            mean = sum(abs(v) for v in w[i].tolist()) / 30
            for j in range(30):
                v = float(w[i, j].detach())
                want = math.copysign(mean, v) if levels == 2 else 4 / 3 * mean * (abs(v) > 2 / 3 * mean) * np.sign(v)
                assert float(made[i, j].detach()) == pytest.approx(want, abs=1e-12)


ACTIVATIONS = [(1, None, (-1, 1)), (2, None, (-1, 0, 1)), (1, 0.0, (0, 1)), (2, 0.0, (0, 1, 2)), (2, -0.17, (0, 1, 2))]


@pytest.mark.parametrize(("bits", "minimum", "codes"), ACTIVATIONS)
def test_elastic_activations_match_the_golden(bits: int, minimum: float | None, codes: tuple[int, ...]) -> None:
    x, up = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
    x = (x if minimum is None else x.abs() + minimum).requires_grad_()
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    made = straight.elastic_activation(x, a, bits, minimum)  # type: ignore[arg-type]
    made.backward(up)
    offset, total = minimum or 0.0, 0.0
    assert x.grad is not None and a.grad is not None
    for v, got, u, g in zip(*(t.detach().flatten().tolist() for t in (x, made, up, x.grad)), strict=True):
        q = (v - offset) / 0.6
        code = (1 if q >= 0 else -1) if codes == (-1, 1) else min(codes, key=lambda c: abs(c - q))
        assert got == pytest.approx(0.6 * code + offset, abs=1e-12)
        inside = codes[0] <= q <= codes[-1]
        assert g == pytest.approx(u * inside)
        total += u * (code if codes == (-1, 1) or not inside else code - q)
    assert float(a.grad) == pytest.approx(total / math.sqrt(63 * codes[-1]))


def test_analytic_minimum_of_gelu() -> None:
    x = torch.linspace(-2, 0, 200001, dtype=torch.float64)
    assert float(torch.nn.functional.gelu(x).min()) == pytest.approx(straight.GELU_MINIMUM, abs=1e-9)
    assert float(straight.initial_activation_scale(torch.ones(3), 2, signed=False)) == pytest.approx(4 / math.sqrt(3))


def test_dual_binarization_matches_the_golden() -> None:
    w, up = torch.randn(6, 20, dtype=torch.float64), torch.randn(6, 20, dtype=torch.float64)
    a1 = torch.rand(6, 1, dtype=torch.float64) + 1
    a2 = -a1 * (torch.rand(6, 1, dtype=torch.float64) * 0.8 + 0.1)
    for t in (w, a1, a2):
        t.requires_grad_()
    made = straight.dual_binary(w, a1, a2)
    made.backward(up)
    assert w.grad is not None and a1.grad is not None and a2.grad is not None
    for i in range(6):
        p, n = float(a1[i].detach()), float(a2[i].detach())
        sums = [0.0, 0.0]
        for j in range(20):
            bits = min(
                ((0, 0), (1, 0), (0, 1), (1, 1)), key=lambda b: abs(b[0] * p + b[1] * n - float(w[i, j].detach()))
            )
            assert float(made[i, j].detach()) == pytest.approx(bits[0] * p + bits[1] * n, abs=1e-12)
            assert float(w.grad[i, j]) == pytest.approx(float(up[i, j]) * (p - n))
            sums = [s + b * float(up[i, j]) for s, b in zip(sums, bits, strict=True)]
        assert [float(a1.grad[i]), float(a2.grad[i])] == pytest.approx(sums)
    spec = DualBinarySpec()
    scale = torch.cat([a1, a2], -1).detach()
    again = spec.decode(spec.encode(w.detach().float(), scale), scale)
    assert torch.allclose(again.double(), made.detach(), atol=1e-5)
    with pytest.raises(InputError, match="a2 < 0"):
        straight.dual_binary(w, a1, -a2)


@few
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.3, 1.0))
def test_allocation_is_the_best_of_all(seed: int, layers: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    size = np.cumsum(draw.uniform(1, 3, (layers, 3)), axis=1)
    cost = np.cumsum(draw.uniform(1e-9, 1, (layers, 3)), axis=1)[:, ::-1] * 1e-6
    budget = float(size.min(1).sum() + share * (size.max(1).sum() - size.min(1).sum()))
    chosen = allocate(cost, size, budget)
    every_choice = np.stack(np.meshgrid(*[range(3)] * layers), -1).reshape(-1, layers)
    at = np.arange(layers)
    fits = [c for c in every_choice if size[at, c].sum() <= budget]
    assert size[at, chosen].sum() <= budget * (1 + 1e-6)
    assert cost[at, chosen].sum() <= min(cost[at, c].sum() for c in fits) * (1 + 1e-4)
    with pytest.raises(InputError, match="smallest formats"):
        allocate(cost, size, float(size.min(1).sum()) * 0.9)


@pytest.mark.parametrize("spec", every(granularity="group", group_size=32), ids=str)
def test_bf16_rows_on_the_int4_kernel_are_near_the_defining_arithmetic(spec: AnyWeight) -> None:
    weight = torch.randn(48, 64).bfloat16()
    linear = QuantLinear.from_float(weight, None, spec, ActivationQuantizer(None, 64))
    x = torch.randn(3, 64).bfloat16()
    fake = linear.set_mode("fake")(x).float()
    packed = linear.set_mode("packed")(x).float()
    fits = not (isinstance(spec, LevelSpec) and spec.kind == "seq" and spec.levels == 16)  # odd integers up to 15
    if not int4.refusal():
        assert linear.kernel.kernel_name == ("int4pack" if fits else "dequantize")
    assert float((packed - fake).norm() / fake.norm()) < 0.01
