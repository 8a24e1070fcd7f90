"""Modules and kernels: Hadamard blocks, the activation quantizer, and packed == fake for every format."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import platform
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calib import memory
from calib.errors import InputError
from calib.memory import page_out
from calib.nn import (
    ActivationQuantizer,
    QuantLinear,
    best_block,
    block_hadamard,
    hadamard_matrix,
    int4,
    kernels,
    tiles,
    together,
)
from calib.nn import codes as shared_codes
from calib.quantizers import AffineSpec, fake_quantize, qparams, weight_range

STATIC = AffineSpec(8, False, "tensor")
TOKEN = AffineSpec(8, False, "token", dynamic=True)
INPUTS = {
    "float": None,
    "static": STATIC.with_(symmetric=True),
    "static-asymmetric": STATIC,
    "static-6": STATIC.with_(bits=6),
    "token": TOKEN.with_(symmetric=True),
    "token-asymmetric": TOKEN,
    "token-4": TOKEN.with_(bits=4),
    "tensor-dynamic": TOKEN.with_(granularity="tensor"),
}
WEIGHTS = {
    "8-channel": AffineSpec(8),
    "8-tensor": AffineSpec(8, granularity="tensor"),
    "8-asymmetric": AffineSpec(8, False),
    "6-channel": AffineSpec(6),
    "4-channel": AffineSpec(4),
    "4-group": AffineSpec(4, granularity="group", group_size=1),  # replaced by a divisor of the width
    "4-group-asymmetric": AffineSpec(4, False, "group", 1),
    "3-channel": AffineSpec(3),
}
INTEGER = {"8-channel", "8-tensor", "6-channel", "4-channel", "3-channel"}
SHAPES = [(48, 64), (7, 33), (1, 8), (65, 1), (33, 129)]


def calibrated(
    spec: AffineSpec | None, features: int, sample: Tensor | None = None, **options: object
) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(spec, features, **options)  # type: ignore[arg-type]
    if quantizer.shift is not None:
        quantizer.shift.normal_()
    if quantizer.rescale is not None:
        quantizer.rescale.uniform_(0.3, 3.0)
    if spec is not None and quantizer.scale is not None and quantizer.zero_point is not None:
        t = quantizer.transformed(torch.randn(200, features) if sample is None else sample)
        scale, zero_point = qparams(t.amin(), t.amax(), spec)
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)
    return quantizer


def linear(
    out: int, n: int, weights: AffineSpec, inputs: AffineSpec | None, bias: bool = True, **options: object
) -> QuantLinear:
    if weights.granularity == "group":
        weights = weights.with_(group_size=next(g for g in (32, 16, 11, 43, 8, 3, 1) if n % g == 0))
    quantizer = calibrated(inputs, n, **options)
    return QuantLinear.from_float(torch.randn(out, n), torch.randn(out) if bias else None, weights, quantizer)


def refused(weights: str) -> str:
    """Why no int8 operator of this machine takes such weights; without VNNI 8 bits saturate, 7 do not."""
    return kernels._refused("qlinear", 127 if WEIGHTS[weights].bits == 8 else 63)


def assert_packed_is_fake(module: QuantLinear, x: Tensor, tolerance: float = 2e-6) -> None:
    """The same bits in both modes, and the textbook formula on decoded values but for its rounding."""
    fake = module.set_mode("fake")(x)
    packed = module.set_mode("packed")(x)
    assert packed.shape == fake.shape and packed.dtype == fake.dtype == x.dtype
    assert torch.equal(packed, fake)
    if x.numel():
        bias = None if module.bias is None else module.bias.double()
        textbook = F.linear(module.input(x).double(), module.dequantize().double(), bias)
        bound = tolerance * max(float(textbook.abs().amax()), float((x.float().norm(dim=-1)).amax()))
        assert float((packed.double() - textbook).abs().amax()) <= bound


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 65, 128])
@pytest.mark.parametrize("shape", [(30, 4), (64, 64), (100, 576), (48, 1536)])
def test_packed_is_fake_whichever_operator_serves_the_shape(rows: int, shape: tuple[int, int]) -> None:
    """oneDNN has kernels for AMX and others, and picks by shape: they multiply by the scales in different order."""
    module = linear(*shape, AffineSpec(8), STATIC)
    assert_packed_is_fake(module, torch.randn(rows, shape[1]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
def test_a_loaded_model_reuses_the_pages_of_its_activations() -> None:
    code = """
import resource, torch
from calib.memory import keep_pages
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(keep_pages(), faults())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said.split()[1]) < 2 * (4 << 20) / resource.getpagesize()  # once and no more, of twenty times


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_a_file_leave_and_come_back(tmp_path: Path) -> None:
    save_file({"x": torch.arange(1 << 20, dtype=torch.int32)}, tmp_path / "x.safetensors")
    x = load_file(tmp_path / "x.safetensors")["x"]
    x[5] = -1  # a page that is the file's no more
    assert int(x.sum()) == (1 << 19) * ((1 << 20) - 1) - 6

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    page_out(x)
    assert resident() < before - (3 << 20) or not memory._of_file(x.data_ptr(), x.data_ptr() + 1)
    assert int(x.sum()) == (1 << 19) * ((1 << 20) - 1) - 6
    own = torch.arange(1 << 20)
    assert not memory._of_file(own.data_ptr(), own.data_ptr() + 8)


# Hadamard


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 64, 76, 96, 128, 140, 12 * 128])
def test_hadamard_matrices_are_orthogonal_signs(order: int) -> None:
    h = hadamard_matrix(order)
    assert torch.equal(h.abs(), torch.ones(order, order))
    assert torch.equal(h @ h.t(), order * torch.eye(order))


@pytest.mark.parametrize("order", [3, 6, 10, 92, 7])
def test_an_order_nobody_knows_is_refused(order: int) -> None:
    with pytest.raises(InputError, match=str(order)):
        hadamard_matrix(order)


@pytest.mark.parametrize("block", [1, 2, 12, 64, 96, 128, 512, 448, 1536])
def test_block_hadamard_is_the_block_diagonal_matrix_and_orthonormal(block: int) -> None:
    x = torch.randn(3, 2, block * 2, dtype=torch.float64)
    dense = torch.block_diag(*[hadamard_matrix(block).double() * block**-0.5] * 2)
    got = block_hadamard(x, block)
    assert torch.allclose(got, x @ dense, atol=1e-12)
    assert torch.allclose(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)
    weight = torch.randn(5, block * 2, dtype=torch.float64)
    assert torch.allclose(got @ block_hadamard(weight, block).t(), x @ weight.t(), atol=1e-11)


def test_block_hadamard_keeps_dtype_shape_and_refuses_a_bad_block() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert block_hadamard(torch.randn(0, 3, 24, dtype=dtype), 12).shape == (0, 3, 24)
        assert block_hadamard(torch.randn(4, 24, dtype=dtype).t().contiguous().t(), 12).dtype == dtype
    with pytest.raises(InputError, match="does not divide"):
        block_hadamard(torch.randn(2, 30), 4)


def test_hadamard_matrices_first_made_elsewhere_still_serve() -> None:
    hadamard_matrix.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        hadamard_matrix(44)
    x = torch.randn(2, 44, requires_grad=True)
    block_hadamard(x, 44).square().sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * x, atol=1e-5)


@pytest.mark.parametrize(("width", "block"), [(1536, 512), (576, 64), (35, 1), (12, 4), (4096, 512)])
def test_best_block(width: int, block: int) -> None:
    assert best_block(width, 512) == block
    assert best_block(width, 64) == min(block, 64)
    assert width % best_block(width) == 0


# the activation quantizer


def test_transform_is_shift_then_rescale_then_rotation() -> None:
    q = calibrated(None, 24, shift=True, rescale=True, hadamard=4)
    assert q.shift is not None and q.rescale is not None
    x = torch.randn(2, 5, 24)
    assert torch.allclose(q(x), block_hadamard((x - q.shift) / q.rescale, 4))
    assert torch.equal(q(x), q.transform(x))
    assert q.transform(x.double()).dtype == torch.float64
    low = x.bfloat16()
    assert torch.equal(q.transform(low), q.transform(low.float()).bfloat16())  # rounded once


@pytest.mark.parametrize("name", [name for name in INPUTS if name != "float"])
def test_codes_stand_for_the_fake_quantized_values(name: str) -> None:
    spec = INPUTS[name]
    q = calibrated(spec, 16, shift=True)
    x = torch.randn(3, 4, 16) * 2
    codes, scale, zero_point = q.codes(q.transformed(x))
    assert codes.dtype == torch.int8
    assert torch.equal((codes.float() - zero_point) * scale, q(x))


def test_rows_outside_a_static_range_stay_float() -> None:
    sample = torch.rand(100, 8) * 2 - 1
    q = calibrated(STATIC, 8, sample, float_rows=True)
    x = sample[:4].clone()
    x[1, 3], x[3, 0] = 300.0, torch.nan
    assert q.outside(x).tolist() == [False, True, False, True]
    y = q(x)
    assert torch.equal(y[1], x[1]) and y[3, 0].isnan() and torch.equal(y[3, 1:], x[3, 1:])
    q.float_rows = False
    assert torch.equal(q(x)[0], y[0]) and q(x)[1, 3] < 2
    assert not q.outside(sample).any()  # the extremes of the calibration data are inside


def test_empty_input() -> None:
    for spec in INPUTS.values():
        assert calibrated(spec, 8)(torch.empty(0, 3, 8)).shape == (0, 3, 8)


# QuantLinear


def test_from_float_rounds_to_nearest() -> None:
    weight, spec = torch.randn(6, 32), AffineSpec(4, granularity="group", group_size=8, range="mse")
    module = QuantLinear.from_float(weight, None, spec, ActivationQuantizer(None, 32))
    want = fake_quantize(weight, *qparams(*weight_range(weight, spec), spec), spec)
    assert torch.equal(module.dequantize(), want)
    assert torch.equal(torch.cat([module.dequantize(slice(4)), module.dequantize(slice(4, 100))]), want)
    x = torch.randn(3, 32)
    assert torch.allclose(module(x), F.linear(x, want), atol=1e-5)


def test_a_group_that_does_not_divide_is_named() -> None:
    with pytest.raises(InputError, match="group size 64 does not divide 100"):
        QuantLinear(100, 4, AffineSpec(4, granularity="group", group_size=64), ActivationQuantizer(None, 100), False)


@pytest.mark.parametrize(("weights", "inputs"), list(itertools.product(WEIGHTS, INPUTS)))
def test_packed_is_fake(weights: str, inputs: str) -> None:
    for number, (out, n) in enumerate(SHAPES):
        module = linear(out, n, WEIGHTS[weights], INPUTS[inputs], bias=number % 2 == 0)
        for lead in ((5,), (1,), (2, 3), (), (0, 4), (40,)):
            assert_packed_is_fake(module, torch.randn(*lead, n) * 1.5)
        integer = weights in INTEGER and inputs != "float"
        fast = "exact" if refused(weights) else "int8 qlinear"
        expected = {"packed": fast if integer else "dequantize", "fake": "exact" if integer else "dequantize"}
        for mode, name in expected.items():
            assert module.set_mode(mode).kernel.kernel_name == name  # type: ignore[arg-type]
        assert bool(module.set_mode("packed").kernel.reason) == (expected["packed"] != "int8 qlinear")


def test_sums_beyond_fp32_stay_exact() -> None:
    """Codes at the ends of their grids over 4,096 inputs: fp32 sums would round."""
    module = QuantLinear(4096, 8, AffineSpec(8), calibrated(STATIC, 4096), False)
    weight = torch.randint(120, 128, (8, 4096), dtype=torch.int8)
    module.set_codes(weight, torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int32))
    x = torch.rand(3, 4096) * 2 + 0.5
    codes, scale, zero_point = module.input.codes(x)
    exact = (codes.long() - zero_point) @ weight.long().t()
    assert int(exact.abs().max()) > 2**24
    assert torch.equal(module(x), exact.float() * scale)
    assert_packed_is_fake(module, x)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from(sorted(INPUTS)),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(0, 10**6),
)
def test_packed_is_fake_for_any_shape(weights: str, inputs: str, out: int, n: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = linear(out, n, WEIGHTS[weights], INPUTS[inputs])
    assert_packed_is_fake(module, torch.randn(rows, n) * torch.logspace(-2, 2, n))


@pytest.mark.parametrize("inputs", ["static-asymmetric", "token-asymmetric", "token"])
@pytest.mark.parametrize("weights", ["8-channel", "4-channel", "4-group"])
def test_packed_is_fake_with_fused_affine_and_rotation(weights: str, inputs: str) -> None:
    for options in ({"shift": True}, {"rescale": True}, {"shift": True, "rescale": True, "hadamard": 16}):
        module = linear(24, 48, WEIGHTS[weights], INPUTS[inputs], **options)
        assert_packed_is_fake(module, torch.randn(2, 9, 48), 5e-6)
        assert_packed_is_fake(module, torch.randn(1, 48), 5e-6)


@pytest.mark.parametrize("weights", ["8-channel", "4-channel", "8-asymmetric"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_is_fake_with_float_rows(weights: str, symmetric: bool) -> None:
    module = linear(24, 48, WEIGHTS[weights], STATIC.with_(symmetric=symmetric), float_rows=True, shift=True)
    x = torch.randn(2, 6, 48)
    x[0, 0, 7], x[1, 3, 2] = 900.0, -4000.0
    assert_packed_is_fake(module, x, 3e-6)
    assert_packed_is_fake(module, x[0, 0], 3e-6)
    assert_packed_is_fake(module, torch.zeros(3, 48))
    clipped = copy.deepcopy(module)
    clipped.input.float_rows = False
    assert (clipped.set_mode("packed")(x) - module.set_mode("packed")(x))[0, 0].abs().max() > 1


@pytest.mark.parametrize("inputs", INPUTS)
def test_blocks_of_rows_and_tiles_of_weights_do_not_matter(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 11, 48)
    x[1, 4, 2] = 700.0
    for weights, float_rows in itertools.product(("8-channel", "4-group"), (False, True)):
        module = linear(40, 48, WEIGHTS[weights], INPUTS[inputs], float_rows=float_rows, shift=True, hadamard=16)
        whole = module.set_mode("packed")(x)
        with monkeypatch.context() as patch:
            patch.setattr(shared_codes, "BLOCK", 100)
            patch.setattr(shared_codes, "CACHED", 500)
            patch.setattr(tiles, "TILE", 1)
            assert torch.allclose(module.set_mode("packed")(x), whole, rtol=0, atol=5e-6 * float(whole.abs().max()))
            assert_packed_is_fake(module, x, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["8-channel", "4-channel", "4-group"])
@pytest.mark.parametrize("inputs", ["float", "static", "token-asymmetric"])
def test_half_precision_is_nearer_packed_than_the_rounding_of_fake(
    weights: str, inputs: str, dtype: torch.dtype
) -> None:
    """In half precision fake rounds its values and weight; both have to lie around the fp32 result."""
    module = linear(48, 64, WEIGHTS[weights], INPUTS[inputs])
    x = torch.randn(3, 5, 64).to(dtype)
    exact = module.set_mode("fake")(x.float())
    module = module.to(dtype)
    assert module.dtype == dtype and module.weight_scale.dtype == module.weight_spec.scale_dtype
    assert module.input.scale is None or module.input.scale.dtype == torch.float32
    worst = {}
    for mode in ("fake", "packed"):
        y = module.set_mode(mode)(x)  # type: ignore[arg-type]
        assert y.dtype == dtype
        worst[mode] = float((y.float() - exact).abs().amax() / exact.abs().amax())
    assert worst["packed"] <= 1.5 * worst["fake"] + torch.finfo(dtype).eps


def test_bf16_groups_run_on_the_int4_kernel_for_few_rows() -> None:
    if int4.refusal():
        pytest.skip(int4.refusal())
    spec = AffineSpec(4, granularity="group", group_size=32)
    module = QuantLinear.from_float(torch.randn(48, 96), torch.randn(48), spec, ActivationQuantizer(None, 96))
    module = module.to(torch.bfloat16).set_mode("packed")
    assert module.kernel.kernel_name == "int4pack" and module.kernel.reason
    for rows in (0, 1, 7, int4.ROWS, int4.ROWS + 1):
        x = torch.randn(rows, 2, 96).bfloat16()
        want = F.linear(x.double(), module.dequantize().double(), module.bias.double())  # type: ignore[union-attr]
        assert rows == 0 or (module(x).double() - want).abs().amax() < 0.01 * want.abs().amax()
    assert module(torch.randn(3, 96)).dtype == torch.float32


def test_zero_rows_and_constant_channels() -> None:
    weight = torch.randn(6, 16)
    weight[2], weight[3] = 0.0, 0.7
    for weights, inputs in itertools.product(("8-channel", "4-channel", "4-group"), INPUTS.values()):
        spec = WEIGHTS[weights]
        spec = spec.with_(group_size=8) if spec.granularity == "group" else spec
        module = QuantLinear.from_float(weight, None, spec, calibrated(inputs, 16))
        x = torch.randn(4, 16)
        x[1] = 0.0
        assert_packed_is_fake(module, x)
        assert bool((module(x)[:, 2] == 0).all()) and torch.allclose(module(x)[1], torch.zeros(6), atol=1e-5)


@pytest.mark.parametrize(("weights", "inputs"), [("8-channel", "static"), ("4-group", "float"), ("3-channel", "token")])
def test_state_dict_round_trip_through_safetensors(weights: str, inputs: str, tmp_path: Path) -> None:
    module = linear(24, 48, WEIGHTS[weights], INPUTS[inputs], shift=True, rescale=True, hadamard=16)
    x = torch.randn(5, 48)
    want = module.set_mode("packed")(x)
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    input_quantizer = ActivationQuantizer(INPUTS[inputs], 48, shift=True, rescale=True, hadamard=16)
    fresh = QuantLinear(48, 24, module.weight_spec, input_quantizer, True).set_mode("packed")
    fresh(x)  # what this prepares must not outlive the load
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(fresh(x), want)
    assert (tmp_path / "m.safetensors").stat().st_size < 48 * 24 * 2 + 6000


def test_what_a_mode_prepares_follows_the_buffers() -> None:
    module, other = (linear(16, 32, AffineSpec(8), TOKEN) for _ in range(2))
    x = torch.randn(4, 32)
    for mode in ("fake", "packed"):
        module.set_mode(mode)(x)  # type: ignore[arg-type]
        twin = copy.deepcopy(module)
        again = pickle.loads(pickle.dumps(module))
        assert twin._kernel is None and torch.equal(again(x), module(x))
        twin.load_state_dict(other.state_dict())
        assert torch.equal(twin(x), other.set_mode(mode)(x))  # type: ignore[arg-type]
        codes = torch.zeros(16, 32, dtype=torch.int8)
        twin.set_codes(codes, twin.weight_scale, torch.zeros(16, 1, dtype=torch.int32))
        assert other.bias is not None and torch.allclose(twin(x), other.bias.expand(4, 16), atol=1e-6)


def test_packed_modules_are_freed_at_once() -> None:
    for inputs in INPUTS.values():
        module = linear(16, 32, AffineSpec(8), inputs).set_mode("packed")
        module(torch.randn(2, 32))
        gc.disable()
        try:
            alive = [weakref.ref(each) for each in (module, module._kernel, module.input)]
            del module
            assert all(each() is None for each in alive)
        finally:
            gc.enable()


def test_stands_in_for_a_weight() -> None:
    module = linear(16, 32, AffineSpec(8), TOKEN, bias=False)
    x, bias = torch.randn(4, 32), torch.randn(16)
    for mode in ("fake", "packed"):
        module.set_mode(mode)  # type: ignore[arg-type]
        assert torch.equal(F.linear(x, module), module(x))  # type: ignore[arg-type]
        assert torch.equal(F.linear(x, weight=module), module(x))  # type: ignore[arg-type]
        assert torch.equal(F.linear(x, module, bias), module(x) + bias)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        torch.matmul(x, module)  # type: ignore[arg-type]


def test_gradients_and_inference_mode() -> None:
    """Packed has no gradients; a model first run in inference mode can still be tuned in fake."""
    module = linear(16, 32, AffineSpec(8), None)
    x = torch.randn(4, 32, requires_grad=True)
    with torch.inference_mode():
        module(torch.randn(2, 32))
    module(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, module.dequantize().sum(0).expand(4, 32), atol=1e-5)
    assert not module.set_mode("packed")(x).requires_grad


# one input, several layers


@pytest.mark.parametrize("spec", [TOKEN, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 5])
def test_layers_of_one_input_share_its_codes(spec: AffineSpec, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, x = linear(16, 32, AffineSpec(8), spec), linear(24, 32, AffineSpec(8), spec), torch.randn(rows, 32)
    second.input = copy.deepcopy(first.input)
    wanted = [module.set_mode("packed")(x.clone()) for module in (first, second)]
    made: list[shared_codes.Codes] = []
    real = shared_codes.Codes
    monkeypatch.setattr(shared_codes, "Codes", lambda *given: made.append(real(*given)) or made[-1])  # type: ignore[func-returns-value]
    with torch.no_grad():
        for order in ((first, second), (second, first)):
            x = x.clone()
            got = {module: module(x) for module in order}
            assert torch.equal(got[first], wanted[0]) and torch.equal(got[second], wanted[1])
        assert len(made) == 2


def test_codes_of_a_changed_input_or_another_grid_are_not_shared() -> None:
    first = linear(16, 32, AffineSpec(8), TOKEN).set_mode("packed")
    other = linear(16, 32, AffineSpec(8), TOKEN).set_mode("packed")
    shifted = linear(16, 32, AffineSpec(8), TOKEN, shift=True).set_mode("packed")
    x = torch.randn(4, 32)
    with torch.no_grad():
        first(x)
        x.mul_(3)  # in place, between two layers
        assert torch.equal(other(x), other(x.clone()))
        first(x)
        assert torch.equal(shifted(x), shifted(x.clone()))
    with torch.inference_mode():
        y = x.clone()
        first(y)
        y.mul_(3)
        assert torch.equal(other(y), other(y.clone()))


def test_shared_codes_do_not_outlive_their_input() -> None:
    module, x = linear(16, 32, AffineSpec(8), TOKEN).set_mode("packed"), torch.randn(4, 32)
    with torch.no_grad():
        module(x)
    assert together._last.kept is not None
    del x
    assert together._last.kept is None


MODES = [torch.no_grad, torch.inference_mode]


def of_one_input(spec: AffineSpec, weights: str = "8-channel", **options: object) -> list[QuantLinear]:
    """Three packed layers on one grid, the last without the others' bits."""
    layers = [linear(out, 32, WEIGHTS[weights], spec, **options) for out in (16, 8, 24)]
    for other in layers[1:]:
        other.input = copy.deepcopy(layers[0].input)
    return [layer.set_mode("packed") for layer in layers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", ["8-channel", "4-channel"])
@pytest.mark.parametrize("spec", [TOKEN, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("plain", [False, True], ids=["packed rows", "plain rows"])
def test_layers_of_one_input_become_one_product(
    plain: bool, spec: AffineSpec, weights: str, mode: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_plain_rows", lambda: plain)
    layers = of_one_input(spec, weights, float_rows=True)
    products: list[int] = []
    real = kernels._Operator.__call__
    monkeypatch.setattr(kernels._Operator, "__call__", lambda *given: products.append(1) or real(*given))  # type: ignore[func-returns-value]
    for rows in (1, 5, 1, together.FEW + 1, 5):
        x = torch.randn(rows, 32)
        x[0, 3] = 100.0
        wanted = [copy.deepcopy(layer).set_mode("fake")(x) for layer in layers]
        counts = []
        for _ in range(3):
            with mode():
                y = x.clone()
                products.clear()
                got = [layer(y) for layer in layers]
            assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, wanted, strict=True))
            counts.append(len(products))
        integer = not refused(weights)
        alone = rows > together.FEW or (plain and rows == 1 and weights == "8-channel")  # on the checkpoint's codes
        assert counts[-1] == integer * (3 if alone else 1)
    copies = copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))
    for layer, *twins in zip(layers, *copies, strict=True):
        assert all(torch.equal(twin.codes(), layer.codes()) and torch.equal(twin(x), layer(x)) for twin in twins)


@pytest.mark.parametrize("rows", [4, 300])
@pytest.mark.parametrize("mode", MODES)
def test_joined_layers_see_changes(mode: type, rows: int) -> None:
    """Of the input between two layers, and of a layer's own weights."""
    layers = of_one_input(STATIC)
    for turn in range(3):
        with mode():
            x = torch.randn(rows, 32)
            layers[0](x)
            x[-1, -1] += 0.5
            assert torch.equal(layers[1](x), copy.deepcopy(layers[1])(x.clone()))
            y = torch.randn(rows, 32)
            wanted = [copy.deepcopy(layer)(y.clone()) for layer in layers]
            assert all(torch.equal(layer(y), want) for layer, want in zip(layers, wanted, strict=True))
        if turn == 1:
            other = linear(8, 32, WEIGHTS["8-channel"], STATIC)
            other.input = copy.deepcopy(layers[0].input)
            layers[1].load_state_dict(other.state_dict())
    assert torch.equal(layers[1].codes(), other.codes())


def test_layers_that_go_different_ways_are_parted() -> None:
    layers = of_one_input(STATIC)
    if kernels._refused("qlinear", 127):
        pytest.skip(kernels._refused("qlinear", 127))
    x = torch.randn(4, 32)
    products: list[int] = []
    with torch.no_grad():
        for layer in layers:
            layer(x)
        for _ in range(20):
            layers[0](x.clone())
        real = kernels._Operator.__call__
        kernels._Operator.__call__ = lambda self, *given: products.append(len(self.scale)) or real(self, *given)  # type: ignore
        try:
            layers[0](x.clone())
        finally:
            kernels._Operator.__call__ = real  # type: ignore[method-assign]
    assert products == [16]


def test_joined_layers_are_freed_at_once() -> None:
    layers = of_one_input(STATIC)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 32)
            for layer in layers:
                layer(x)
    del x
    gc.disable()
    try:
        alive = [weakref.ref(layer) for layer in layers]
        del layer
        layers.clear()
        assert all(each() is None for each in alive)
    finally:
        gc.enable()


# which kernel


def test_describe_names_a_kernel_for_every_format() -> None:
    table = kernels.describe()
    assert {"w8a8", "w8a8-static"} <= set(table)
    assert all(isinstance(line, str) and line for line in table.values())


def test_a_machine_that_saturates_falls_back_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VNNI pairs of products clamp to int16: the probe has to see it; weights to 63 stay exact."""

    def saturating(codes: shared_codes.Codes, zero: int, packed: Tensor, scale: Tensor, *rest: object) -> Tensor:
        u = codes.unsigned.long().unsqueeze(1) * packed.long().unsqueeze(0)
        u = F.pad(u, (0, u.shape[-1] % 2)).unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return (u.sum(-1) - 128 * packed.long().sum(-1)).float()

    monkeypatch.setattr(kernels, "_qlinear", saturating)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda w, _: w)
    kernels._refused.cache_clear()
    try:
        assert "not exact" in kernels._refused("qlinear", 127)
        assert not kernels._refused("qlinear", 63)
        assert "not exact" in kernels.describe()["w8a8"]
        module = linear(16, 32, AffineSpec(8), TOKEN).set_mode("packed")
        assert module.kernel.kernel_name == "exact" and "not exact" in module.kernel.reason
    finally:
        kernels._refused.cache_clear()


@pytest.mark.parametrize("spec", [STATIC, TOKEN])
def test_signed_and_unsigned_activations_give_the_same_bits(spec: AffineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN takes both; with AMX the signed codes as they are."""
    x = torch.randn(7, 48)
    found = []
    for signed in (False, True):
        monkeypatch.setattr(kernels, "_takes_signed", lambda s=signed: s)
        for cached in (kernels._refused, kernels._fuses):
            cached.cache_clear()
        torch.manual_seed(0)
        module = linear(32, 48, AffineSpec(8 if not kernels._refused("qlinear", 127) else 7), spec, bias=True)
        found.append(module.set_mode("packed")(x))
    for cached in (kernels._refused, kernels._fuses):
        cached.cache_clear()
    assert torch.equal(*found)


def test_a_missing_operator_falls_back_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise RuntimeError("onednn::qlinear_pointwise is not there")

    monkeypatch.setattr(kernels, "_qlinear", missing)
    kernels._refused.cache_clear()
    try:
        module = linear(16, 32, AffineSpec(8), TOKEN)
        assert_packed_is_fake(module, torch.randn(3, 32))
        assert "does not run here" in module.kernel.reason
    finally:
        kernels._refused.cache_clear()


def test_modules_nest_in_a_model() -> None:
    model = nn.Sequential(linear(32, 16, AffineSpec(8), TOKEN), nn.GELU(), linear(8, 32, AffineSpec(4), None))
    x = torch.randn(3, 16)
    want = model(x)
    for module in model:
        if isinstance(module, QuantLinear):
            module.set_mode("packed")
    assert torch.allclose(model(x), want, atol=1e-4)
    assert model.double()(x.double()).dtype == torch.float64
