"""float8 e4m3: the grid against its definition, through the one call, on the device's product."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import calib
from calib.errors import InputError, ModelError
from calib.export import checkpoint, targets
from calib.export.verify import answer
from calib.nn import ActivationQuantizer, QuantLinear, float8
from calib.quantizers import (
    AffineSpec,
    Float8Spec,
    decode,
    describe_weight,
    encode,
    fake_quantize,
    input_spec,
    minmax,
    qparams,
    straight,
    weight_range,
    weight_spec,
)
from calib.recipe import SCHEMES, Scheme
from tests import families
from tests.small import save_llama

STATIC, TOKEN = Float8Spec(granularity="tensor"), Float8Spec(granularity="token", dynamic=True)


def meaning(bits: int) -> float:
    """What eight bits stand for, from the format's definition: 1 sign, 4 exponent (bias 7), 3 mantissa."""
    sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, (bits >> 3) & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


POSITIVE = [meaning(bits) for bits in range(0x7F)]  # in rising order; an even index is an even mantissa


def nearest(value: float) -> float:
    """The number of the format nearest to a value, ties to the even mantissa, the largest beyond."""
    size = min(abs(value), POSITIVE[-1])
    above = bisect.bisect_left(POSITIVE, size)
    below = max(above - 1, 0)
    up, down = POSITIVE[above] - size, size - POSITIVE[below]
    chosen = above if up < down or (up == down and above % 2 == 0) else below
    return math.copysign(POSITIVE[chosen], value)


def test_every_code_means_what_the_format_says() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    got = Float8Spec().numbers(codes)
    want = torch.tensor([meaning(int(code) & 0xFF) for code in codes])
    assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))
    assert max(POSITIVE) == 448 == Float8Spec().qmax
    kept = ~got.isnan()
    assert torch.equal(Float8Spec().stored(got)[kept], codes[kept])


@given(st.lists(st.floats(-1000, 1000, width=32) | st.floats(-0.0625, 0.0625, width=32), min_size=1, max_size=40))
def test_snap_is_to_the_nearest_number_of_the_format(values: list[float]) -> None:
    got = Float8Spec().snap(torch.tensor(values, dtype=torch.float32))
    assert got.tolist() == [nearest(value) for value in values]


def test_snap_has_the_bits_of_a_cast() -> None:
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(POSITIVE)])
    odd = torch.tensor([math.inf, -math.inf, -0.0, 1e-45, -1e-8, 448.5, 470.0, 3e38])
    q = torch.cat([middles, -middles, odd, torch.randn(10_000) * 100])
    cast = q.clamp(-448, 448).to(torch.float8_e4m3fn)
    got = Float8Spec().snap(q.clone())
    assert torch.equal(got.view(torch.int32), cast.float().view(torch.int32))
    assert bool(Float8Spec().snap(torch.tensor([math.nan])).isnan())


@pytest.mark.parametrize("spec", [Float8Spec(), STATIC, TOKEN, Float8Spec(granularity="group", group_size=16)], ids=str)
def test_codes_decode_to_what_fake_quantization_gives(spec: Float8Spec) -> None:
    x = torch.randn(24, 64) * torch.logspace(-3, 2, 64)
    x[3] = 0
    scale, zero_point = qparams(*minmax(x, spec), spec)
    codes = encode(x, scale, zero_point, spec)
    got = decode(codes, scale, zero_point, spec)
    assert codes.dtype == torch.int8
    assert torch.equal(got, fake_quantize(x, scale, zero_point, spec))
    assert not got[3].any()
    units = (x.view(24, -1, 16) / scale).view_as(x) if spec.granularity == "group" else x / scale
    normal = units.abs() >= 2.0**-6
    assert bool(((got - x).abs()[normal] <= x.abs()[normal] * (2.0**-4 + 1e-6)).all())


def test_the_step_follows_the_value_where_integers_keep_one() -> None:
    """What makes float8 of use: a channel a hundred times the others costs them nothing, at eight bits either way."""
    x = torch.randn(512, 64)
    x[:, 0] *= 100
    errors = {}
    for spec in (STATIC, AffineSpec(8, granularity="tensor")):
        got = fake_quantize(x, *qparams(*minmax(x, spec), spec), spec)
        errors[type(spec)] = float((got - x)[:, 1:].square().mean())
    assert errors[Float8Spec] < 0.1 * errors[AffineSpec]


def test_ranges_may_be_searched_and_never_lose() -> None:
    weight = torch.randn(16, 128)
    error = {}
    for rule in ("minmax", "mse"):
        spec = Float8Spec(range=rule)  # type: ignore[arg-type]
        error[rule] = (
            (fake_quantize(weight, *qparams(*weight_range(weight, spec), spec), spec) - weight).square().sum(1)
        )
    assert bool((error["mse"] <= error["minmax"]).all())


def test_a_format_is_json_and_back() -> None:
    for spec in (Float8Spec(), STATIC, TOKEN):
        assert input_spec(describe_weight(spec)) == weight_spec(describe_weight(spec)) == spec
        assert spec != AffineSpec(**{k: v for k, v in describe_weight(spec).items() if k != "kind"})
    scheme = SCHEMES["fp8-static"]
    assert Scheme.model_validate_json(scheme.model_dump_json()) == scheme
    with pytest.raises(TypeError, match="inputs on a seq grid"):
        input_spec({"kind": "seq", "levels": 4})


@pytest.mark.parametrize("change", [{"weight_bits": 4}, {"input_symmetric": False}])
def test_what_float8_has_not_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match="8 bits and no zero point"):
        calib.recipe.scheme("fp8-static", **change)


def test_nothing_learns_the_rounding_of_float8() -> None:
    with pytest.raises(InputError, match="refine learns affine integers"):
        calib.recipe.recipe(SCHEMES["fp8"], "rtn", refine=10)


@pytest.mark.parametrize("format", ["gptq", "awq", "gguf", "onnx"])
def test_formats_of_integers_refuse_it(format: str) -> None:
    recipe = calib.recipe.recipe(SCHEMES["fp8"], "rtn", stock=True)
    with pytest.raises(InputError, match=f"{format} cannot express this.*float8.*compressed-tensors"):
        targets.refuse(format, recipe, torch.float32)


def linear(inputs: Float8Spec, bias: bool) -> QuantLinear:
    weight = torch.randn(48, 64) * torch.logspace(-1, 1, 48).unsqueeze(1)
    quantizer = ActivationQuantizer(inputs, 64)
    if not inputs.dynamic:
        quantizer.scale = torch.tensor([0.01])
    return QuantLinear.from_float(weight, torch.randn(48) if bias else None, Float8Spec(), quantizer)


@pytest.mark.parametrize("inputs", [STATIC, TOKEN], ids=["static", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scaled_product_gives_what_decoding_gives(
    inputs: Float8Spec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of CUDA, on the CPU's own (slow) operator."""
    module = linear(inputs, bias=True)
    x = torch.randn(2, 5, 64).to(dtype)
    simulated = module(x)
    assert module.set_mode("packed").kernel.kernel_name == "dequantize"
    monkeypatch.setattr(float8, "DEVICES", ("cpu",))
    packed = module.set_mode("packed")(x)
    assert module.kernel.kernel_name == "float8 scaled_mm"
    assert packed.dtype == dtype and packed.shape == simulated.shape
    tolerance = (
        1e-2 if dtype == torch.bfloat16 else 1e-6
    )  # there, what is decoded is rounded to bf16 before the product
    assert float((packed - simulated).abs().max()) <= tolerance * float(simulated.abs().max())
    assert module(x[:0]).shape == (0, 5, 48)


def test_gradients_are_those_of_its_own_numbers() -> None:
    """LSQ with the numbers of the format in place of integers: dL/da = number - w / a inside, the largest beyond."""
    weight, scale, spec = torch.randn(4, 16) * 300, torch.ones(4, 1), Float8Spec()
    a = scale.clone().requires_grad_()
    w = weight.clone().requires_grad_()
    values = straight.on_grid(w, a, torch.zeros(()), spec)
    assert torch.equal(values.detach(), torch.tensor([[nearest(float(v)) for v in row] for row in weight]))
    values.sum().backward()
    inside = weight.abs() <= 448
    slope = torch.where(inside, values.detach() - weight, values.detach())
    assert torch.equal(w.grad, inside.float())  # type: ignore[arg-type]
    assert torch.allclose(a.grad, slope.sum(1, keepdim=True) / math.sqrt(64 * 448), rtol=1e-5)  # type: ignore[arg-type]


def relative_error(model: nn.Module, wanted: Tensor, batch: dict[str, Tensor]) -> float:
    got = answer(model, batch)
    return float((got - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral", "bart"])
@pytest.mark.parametrize("scheme", ["fp8", "fp8-static"])
def test_families_through_the_one_call(family: str, scheme: str, tmp_path: Path) -> None:
    batches = families.batches(family)
    model = families.build(family)
    wanted = answer(model, batches[0])
    result = calib.quantize(model, scheme, "os+", batches, progress=False, report=False)
    assert relative_error(result.network, wanted, batches[0]) < 0.02
    checkpoint.save(result.network, None, tmp_path / "out", manifest={})
    loaded = calib.load(tmp_path / "out", mode="fake")
    assert any(isinstance(m, QuantLinear) for m in loaded.modules())
    assert torch.equal(answer(loaded, batches[0]), answer(result.network, batches[0]))


def test_streamed_into_a_stock_checkpoint(tmp_path: Path, byte_tokenizer: object) -> None:
    folder = save_llama(tmp_path / "model", byte_tokenizer)
    data = tmp_path / "text.txt"
    data.write_text("Some text that is long enough for a few windows. " * 40)
    calib.quantize(
        str(folder), "fp8", "auto", data, out=tmp_path / "out", progress=False, samples=6, seq_len=32,
        format="compressed-tensors", report=False,
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    q_proj = calib.load(tmp_path / "out").model.layers[0].self_attn.q_proj  # type: ignore[union-attr,index]
    assert isinstance(q_proj, QuantLinear) and q_proj.weight_spec == Float8Spec()
    plain = json.loads((tmp_path / "out" / "config.json").read_text())
    del plain["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ModelError, match="F8_E4M3"):  # nothing says so now, and it is no float model to begin from
        calib.quantize(str(tmp_path / "out"), "fp8", "rtn", data, out=tmp_path / "again", progress=False)
