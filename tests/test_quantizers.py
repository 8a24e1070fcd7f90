"""Grids, ranges and packing: same bits on every path, never outside the grid, never worse than min-max."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import InputError, NumericsError
from calib.nn import ActivationQuantizer, QuantLinear
from calib.quantizers import (
    AffineSpec,
    bits_per_weight,
    decode,
    encode,
    fake_quantize,
    fake_quantize_dynamic,
    grouped,
    minmax,
    pack,
    packed_width,
    qparams,
    tensor_range,
    unpack,
    weight_range,
)

few = settings(max_examples=40, deadline=None)


def specs(**fixed: object) -> st.SearchStrategy[AffineSpec]:
    def build(bits: int, symmetric: bool, granularity: str) -> AffineSpec:
        group = 8 if granularity == "group" else None
        return AffineSpec(bits, symmetric, granularity, group, **fixed)  # type: ignore[arg-type]

    granularities = st.sampled_from(["tensor", "channel", "group", "token"])
    return st.builds(build, st.integers(2, 8), st.booleans(), granularities)


def sample(seed: int, rows: int, columns: int) -> Tensor:
    """Values of many magnitudes, some zero, some channels far from the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.logspace(-3, 3, columns) + torch.randn(columns, generator=generator)
    return x * (torch.rand(rows, columns, generator=generator) > 0.1)


@few
@example(AffineSpec(8, False, "group", 8), 268, 2, 1)  # bf16 rounds the second group's scale down by 0.3 %
@given(specs(), st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_every_path_gives_the_same_bits_inside_the_grid(spec: AffineSpec, seed: int, rows: int, groups: int) -> None:
    x = sample(seed, rows, 8 * groups)
    scale, zero_point = qparams(*minmax(x, spec), spec)
    codes = encode(x, scale, zero_point, spec)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert spec.qmin <= codes.min() and codes.max() <= spec.qmax
    values = decode(codes, scale, zero_point, spec)
    assert torch.equal(values, fake_quantize(x, scale, zero_point, spec))
    assert torch.equal(values, fake_quantize_dynamic(x, spec))
    assert torch.equal(encode(values, scale, zero_point, spec), codes)  # the grid is a fixed point
    error = grouped((values - x).abs(), spec)
    assert bool((error <= scale * 1.001 * (0.5 if spec.symmetric else 1.0) + 1e-12).all())


@few
@given(specs(), st.integers(0, 10**6))
def test_zero_is_always_exact(spec: AffineSpec, seed: int) -> None:
    x = sample(seed, 5, 16)
    assert bool((fake_quantize_dynamic(x, spec)[x == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_grid_ends(bits: int, symmetric: bool) -> None:
    spec = AffineSpec(bits, symmetric, "tensor")
    assert spec.qmax - spec.qmin + 1 == 2**bits - symmetric
    scale, zero_point = qparams(torch.tensor(-1.0), torch.tensor(3.0), spec)
    ends = encode(torch.tensor([-100.0, 100.0]), scale, zero_point, spec)
    assert ends.tolist() == [spec.qmin, spec.qmax]
    low, high = decode(ends, scale, zero_point, spec).tolist()
    assert high == pytest.approx(3.0, abs=float(scale) / 2)
    assert low == pytest.approx(-3.0 if symmetric else -1.0, abs=float(scale) / 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_constant_rows_and_tiny_rows(symmetric: bool) -> None:
    spec = AffineSpec(8, symmetric, "channel")
    x = torch.stack([torch.zeros(6), torch.full((6,), 5.0), torch.full((6,), -5.0), torch.full((6,), 1e-12)])
    got = fake_quantize_dynamic(x, spec)
    assert torch.equal(got[0], x[0])
    assert torch.allclose(got[1:], x[1:], rtol=1e-6, atol=0)


def test_one_bit_is_a_sign_and_nothing_is_zero() -> None:
    spec, x = AffineSpec(1, granularity="tensor", range="mse"), torch.randn(50, 40)
    scale, zero = qparams(*tensor_range(x, *minmax(x, spec), spec), spec)
    assert float(scale) == pytest.approx(float(x.abs().mean()), rel=0.1), "where the squared error is least"
    values = fake_quantize(torch.tensor([-3.0, -0.0, 0.0, 1e-3, torch.nan]), scale, zero, spec) / scale
    assert values[:4].tolist() == [-1, 1, 1, 1] and bool(values[4].isnan())
    assert torch.equal(decode(encode(x, scale, zero, spec), scale, zero, spec), fake_quantize(x, scale, zero, spec))
    counted = AffineSpec(1, symmetric=False, granularity="tensor")
    scale, zero = qparams(torch.tensor(0.0), torch.tensor(3.0), counted)
    assert fake_quantize(torch.tensor([-1.0, 1.0, 2.0, 9.0]), scale, zero, counted).tolist() == [0, 0, 3, 3]
    for wrong in ({"granularity": "token", "dynamic": True}, {"granularity": "channel"}):
        with pytest.raises(InputError):
            AffineSpec(1, **wrong)  # type: ignore[arg-type]


def test_rounds_half_to_even() -> None:
    spec = AffineSpec(8, True, "tensor")
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert encode(halves, one, zero, spec).tolist() == [0, 2, 2, 0, -2, -2]
    odd = encode(halves, one, zero + 3, AffineSpec(8, False, "tensor"))  # of the code, zero point included
    assert odd.tolist() == [4, 4, 6, 2, 2, 0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_compressed_tensors(symmetric: bool) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    spec, x = AffineSpec(8, symmetric, "tensor"), torch.randn(64, 64).mul(8).round().div(16)  # many ties
    scale, zero_point = torch.tensor(0.125), torch.tensor(0 if symmetric else 7, dtype=torch.int32)
    theirs = forward.fake_quantize(
        x, scale, zero_point.to(torch.int8), args(num_bits=8, symmetric=symmetric, strategy="tensor")
    )
    assert torch.equal(fake_quantize(x, scale, zero_point, spec), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_arithmetic_is_fp32(dtype: torch.dtype) -> None:
    spec = AffineSpec(8, False, "token", dynamic=True)
    x = sample(3, 7, 32).to(dtype)
    got = fake_quantize_dynamic(x, spec)
    assert got.dtype == dtype
    assert torch.equal(got, fake_quantize_dynamic(x.float(), spec).to(dtype))


def test_values_that_are_not_finite() -> None:
    """Static: inf clamps, NaN stays. Dynamic: that row comes out NaN, no other. Ranges refuse both."""
    static = AffineSpec(8, True, "tensor")
    scale, zero_point = qparams(torch.tensor(-1.0), torch.tensor(1.0), static)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.5])
    got = fake_quantize(x, scale, zero_point, static)
    assert got[0] == 1.0 and got[1] == -1.0 and got[2].isnan() and abs(got[3] - 0.5) < 0.01
    rows = torch.ones(3, 4)
    rows[1, 2], rows[2, 2] = torch.nan, torch.inf
    for symmetric in (True, False):
        dynamic = fake_quantize_dynamic(rows, AffineSpec(8, symmetric, "token", dynamic=True))
        assert dynamic[0].isfinite().all() and dynamic[1].isnan().all() and dynamic[2].isnan().any()
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = torch.randn(4, 8)
        weight[2, 3] = bad
        for rule in ("minmax", "mse", "percentile"):
            with pytest.raises(NumericsError, match="NaN or infinity"):
                weight_range(weight, AffineSpec(4, True, "channel", range=rule))
            with pytest.raises(NumericsError, match="activation"):
                tensor_range(weight, weight.amin(), weight.amax(), AffineSpec(8, True, "tensor", range=rule))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"granularity": "group"}, "group_size"),
        ({"group_size": 64}, "group_size"),
        ({"granularity": "group", "group_size": 0}, "positive"),
        ({"percentile": 20.0}, "percentile"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        AffineSpec(**arguments)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="does not divide 30"):
        grouped(torch.ones(2, 30), AffineSpec(4, granularity="group", group_size=8))


def test_bits_per_weight() -> None:
    assert bits_per_weight((64, 128), AffineSpec(4, granularity="group", group_size=64)) == 4.25
    assert bits_per_weight((64, 128), AffineSpec(4, False, "group", 64)) == 4.375
    assert bits_per_weight((64, 128), AffineSpec(4, False, "group", 64), 16, 4) == 4.3125, "as packed zero points"
    assert bits_per_weight((64, 128), AffineSpec(8)) == 8.25


@few
@given(st.integers(1, 40), st.integers(1, 6), st.integers(2, 8), st.booleans(), st.sampled_from([1, 3, 8, 32]))
def test_bits_per_weight_is_what_is_stored(out: int, groups: int, bits: int, symmetric: bool, size: int) -> None:
    for spec in (AffineSpec(bits, symmetric, "group", size), AffineSpec(bits, symmetric)):
        shape = out, groups * size
        module = QuantLinear.from_float(torch.randn(shape), None, spec, ActivationQuantizer(None, shape[1]))
        stored = sum(t.numel() * t.element_size() for name, t in module.state_dict().items() if "weight" in name)
        assert stored * 8 == pytest.approx(bits_per_weight(shape, spec) * out * shape[1], rel=1e-9)


@few
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=128, max_size=128), st.booleans())
def test_scales_of_groups_are_exact_in_bf16(values: list[float], symmetric: bool) -> None:
    """So what was measured is what any export holds; bf16 rounds by 2^-8 at most, and so the ends of a range move."""
    weight, spec = torch.tensor(values).view(4, 32), AffineSpec(8, symmetric, "group", 8)
    scale, zero = qparams(*minmax(weight, spec), spec)
    assert torch.equal(scale.bfloat16().float(), scale)
    error = (fake_quantize(weight, scale, zero, spec) - weight).view(4, 4, 8).abs()
    ends = 0 if symmetric else (spec.qmax - spec.qmin) / 256
    assert bool((error <= (0.501 + ends) * scale + 1e-6).all())


# ranges


def weighted_error(x: Tensor, lo: Tensor, hi: Tensor, spec: AffineSpec, cost: Tensor) -> Tensor:
    error = (fake_quantize(x, *qparams(lo, hi, spec), spec) - x).double().square() * cost.double()
    return error.sum() if spec.granularity == "tensor" else grouped(error, spec).sum(-1)


@few
@given(specs(range="mse"), st.integers(0, 10**6), st.booleans())
def test_mse_weight_range_is_never_worse_than_min_max(spec: AffineSpec, seed: int, weighted: bool) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) ** 3
    cost = torch.rand(40, generator=torch.Generator().manual_seed(seed)) if weighted else torch.ones(40)
    found = weight_range(weight, spec, cost if weighted else None)
    assert [end.shape for end in found] == [end.shape for end in minmax(weight, spec)]
    best, plain = (weighted_error(weight, *r, spec, cost) for r in (found, minmax(weight, spec)))
    assert bool((best <= plain * (1 + 1e-6)).all())


def test_mse_weight_range_is_the_brute_force_pick_and_blocks_do_not_matter() -> None:
    torch.manual_seed(0)
    weight, cost = torch.randn(3000, 128) ** 3, torch.rand(128)  # more rows than one block holds
    spec = AffineSpec(3, True, "channel", range="mse")
    lo, hi = weight_range(weight, spec, cost)
    base = minmax(weight, spec)
    errors = [weighted_error(weight, base[0] * r, base[1] * r, spec, cost) for r in torch.arange(1.0, 0.29, -0.02)]
    best = torch.stack(errors).amin(0)
    assert torch.allclose(weighted_error(weight, lo, hi, spec, cost), best, rtol=1e-4)
    assert bool((weighted_error(weight, *base, spec, cost) > best * 1.05).any())


@few
@given(st.integers(2, 8), st.booleans(), st.integers(0, 10**6), st.booleans())
def test_mse_tensor_range_is_never_worse_on_its_sample(bits: int, symmetric: bool, seed: int, heavy: bool) -> None:
    spec = AffineSpec(bits, symmetric, "tensor", range="mse")
    generator = torch.Generator().manual_seed(seed)
    rows, cost = torch.randn(64, 24, generator=generator), torch.rand(24, generator=generator)
    if heavy:
        rows[0, 3], rows[1, 4] = 900.0, -40.0
    found = tensor_range(rows, rows.amin(), rows.amax(), spec, cost)
    best, plain = (weighted_error(rows, *r, spec, cost) for r in (found, (rows.amin(), rows.amax())))
    assert best <= plain * (1 + 1e-6)


def test_mse_tensor_range_sees_the_crowd_beside_a_sink() -> None:
    """A sink 3000 times the rest that costs nothing: the range must resolve the rest, not the sink."""
    torch.manual_seed(1)
    rows, cost = torch.randn(2048, 32), torch.ones(32)
    rows[:, 5] = 3000.0
    cost[5] = 0.0
    lo, hi = tensor_range(rows, rows.amin(), rows.amax(), AffineSpec(8, False, "tensor", range="mse"), cost)
    assert hi < 3000 / 100 and lo < -2


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_percentile_range(granularity: str) -> None:
    torch.manual_seed(2)
    group = 500 if granularity == "group" else None
    spec = AffineSpec(8, False, granularity, group, range="percentile", percentile=90.0)  # type: ignore[arg-type]
    weight = torch.randn(8, 1000)
    lo, hi = weight_range(weight, spec)
    flat = weight.reshape(1, -1) if granularity == "tensor" else grouped(weight, spec)
    want = torch.quantile(flat, torch.tensor([0.05, 0.95]), dim=-1, keepdim=True)
    assert torch.allclose(lo.reshape(-1), want[0].reshape(-1), atol=1e-5)
    assert torch.allclose(hi.reshape(-1), want[1].reshape(-1), atol=1e-5)
    assert lo.shape == minmax(weight, spec)[0].shape
    low, high = tensor_range(weight, weight.amin(), weight.amax(), spec.with_(granularity="tensor", group_size=None))
    assert low == pytest.approx(-1.645, abs=0.1) and high == pytest.approx(1.645, abs=0.1)


def test_min_max_range_takes_the_extremes_of_all_rows() -> None:
    lo, hi = torch.tensor(-7.0), torch.tensor(9.0)
    got = tensor_range(torch.zeros(2, 2), lo, hi, AffineSpec(8, True, "tensor"))
    assert got == (lo, hi)


def test_an_importance_that_does_not_fit_is_refused() -> None:
    spec = AffineSpec(4, range="mse")
    with pytest.raises(InputError, match="importance"):
        weight_range(torch.randn(4, 8), spec, torch.ones(4))
    with pytest.raises(NumericsError, match="importance"):
        weight_range(torch.randn(4, 8), spec, torch.full((8,), torch.nan))


# packing


@few
@given(st.integers(2, 8), st.integers(0, 5), st.integers(1, 70), st.integers(0, 10**6))
def test_pack_then_unpack_is_identity(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(pack(codes.t().contiguous().t(), bits), packed)  # strides do not matter


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 33, 100])
def test_pack_is_the_layout_of_compressed_tensors(bits: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8, generator=generator)
    theirs = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, columns), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_pack_works_in_blocks_of_rows(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5000, 999), dtype=torch.int8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, 999), codes)
    assert torch.equal(packed[4321:4322], pack(codes[4321:4322], bits))


def test_pack_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(InputError, match="int8"):
        pack(torch.zeros(2, 2), 4)
    with pytest.raises(InputError, match="bits"):
        pack(torch.zeros(2, 2, dtype=torch.int8), 9)
    with pytest.raises(InputError, match="width 1"):
        unpack(torch.zeros(2, 1, dtype=torch.int32), 4, 9)


@few
@given(st.integers(2, 8), st.booleans(), st.integers(1, 4), st.integers(0, 10**6))
def test_decoding_packed_codes_gives_the_fake_quantized_weight(
    bits: int, symmetric: bool, groups: int, seed: int
) -> None:
    spec = AffineSpec(bits, symmetric, "group", 8, range="mse")
    weight = sample(seed, 5, 8 * groups)
    assume(bool(weight.isfinite().all()))
    scale, zero_point = qparams(*weight_range(weight, spec), spec)
    codes = unpack(pack(encode(weight, scale, zero_point, spec), bits), bits, weight.shape[1])
    assert torch.equal(decode(codes, scale, zero_point, spec), fake_quantize(weight, scale, zero_point, spec))
