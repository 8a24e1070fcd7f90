"""Exports for other programs: layouts against independent decoders, what is folded, refused, verified."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import calib
from calib import cli
from calib.errors import InputError, OutputError, VerifyError
from calib.export import awq, checkpoint, gguf, gptq, plain, targets
from calib.export.verify import REFERENCE, reference_batch, reference_of, store_reference
from calib.export.verify_worker import decoded_awq, decoded_gptq, onnxruntime_answer
from calib.export.weight_only import drop_inputs, grid_of
from calib.nn import ActivationQuantizer, QuantLinear, SideBranch
from calib.quantizers import AffineSpec, LevelSpec
from experiments.bench import formats
from tests.families import COMMON, FAMILIES, batches, build, logits

DOCS = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
SPECS = {
    "w4 groups": AffineSpec(4, granularity="group", group_size=32),
    "w4 groups, zero points": AffineSpec(4, symmetric=False, granularity="group", group_size=64),
    "w4 rows": AffineSpec(4),
    "w4 tensor": AffineSpec(4, granularity="tensor"),
    "w3 even levels": LevelSpec(kind="seq", levels=8, granularity="group", group_size=32),
    "w8 rows": AffineSpec(8),
    "w8 groups": AffineSpec(8, granularity="group", group_size=32),
}


def linear(spec: Any, n: int = 128, out: int = 40) -> QuantLinear:
    return QuantLinear.from_float(torch.randn(out, n), None, spec, ActivationQuantizer(None, n))


def rounded(module: QuantLinear) -> Tensor:
    """The weight [out, in] with scales in fp16, from the grid's definition alone."""
    grid = grid_of(module)
    times = module.in_features // grid.scale.shape[1]
    scale, zero = (t.repeat_interleave(times, 1) for t in (grid.scale.float(), grid.zero.float()))
    return (grid.codes.float() - zero) * scale


@pytest.mark.parametrize("name", SPECS)
def test_layouts_decode_to_the_weight(name: str) -> None:
    module = linear(SPECS[name])
    want = rounded(module)
    assert torch.allclose(want, module.dequantize(), rtol=2**-10, atol=0)
    form = "gptq" if SPECS[name].symmetric else "gptq_v2"
    entry = {"bits": grid_of(module).bits, "checkpoint_format": form}
    assert torch.equal(decoded_gptq(gptq.tensors_of(module), entry), want)
    if grid_of(module).bits == 4:
        assert torch.equal(decoded_awq(awq.tensors_of(module)), want)


@pytest.mark.parametrize("name", SPECS)
def test_gguf_blocks_decode_to_the_weight(name: str) -> None:
    import gguf as package

    module = linear(SPECS[name])
    kind, data = gguf.blocks_of(grid_of(module), SPECS[name].symmetric)
    assert kind == {True: "Q8_0", False: "Q4_0" if SPECS[name].symmetric else "Q4_1"}["8" in name.split()[0]]
    got = torch.from_numpy(package.dequantize(data, package.GGMLQuantizationType[kind]))
    exact = kind != "Q4_1"  # whose offset is a rounded product
    assert torch.allclose(got, rounded(module), rtol=0, atol=0 if exact else 16 * 2**-11 * float(got.abs().max()))


def test_words_are_those_of_the_published_layouts() -> None:
    module = linear(SPECS["w4 groups"], 32, 8)
    module.set_codes(torch.arange(-8, 8, dtype=torch.int8).repeat(16).view(8, 32), torch.ones(8, 1, 1), torch.zeros(1))
    found = gptq.tensors_of(module)
    assert {int(word) & 0xFFFFFFFF for word in found["qzeros"].flatten()} == {0x77777777}
    assert int(found["qweight"][0, 0]) & 0xFFFFFFFF == 0x76543210
    module.set_codes(
        torch.arange(-4, 4, dtype=torch.int8).repeat(32, 1).T.contiguous(), torch.ones(8, 1, 1), torch.zeros(1)
    )
    found = awq.tensors_of(module)
    assert int(found["qweight"][0, 0]) & 0xFFFFFFFF == 0xB975A864  # columns 4 to b in the order 0 2 4 6 1 3 5 7
    assert {int(word) & 0xFFFFFFFF for word in found["qzeros"].flatten()} == {0x88888888}


def quantized(
    family: str, scheme: str = "w4a16", method: str = "rtn", exclude: str | None = None, **options: Any
) -> calib.Result:
    given: dict[str, Any] = {"weight_group": 32} if "a16" in scheme else {}
    given |= {} if exclude is None else {"exclude": (exclude,)}
    return calib.quantize(
        build(family), scheme, method, batches(family), samples=8, seq_len=24, progress=False, scheme_options=given,
        **{"prefix": "none", **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calib checkpoint of weights alone, with the reference that a verified one has."""
    result = quantized("llama")
    folder = result.save(tmp_path_factory.mktemp("source") / "llama", "calib", verified=False)
    inputs = reference_batch(batches("llama")[0])
    store_reference(folder, reference_of(result.model, inputs, "calib"), inputs)
    return folder


@pytest.mark.parametrize("format", ["float", "gptq", "awq", "gguf"])
def test_converted_is_the_same_model(format: str, source: Path, tmp_path: Path) -> None:
    assert calib.convert(source, format, tmp_path / "out", verified=False) is None
    from calib.export.verify_worker import transformers_model

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stock, _ = transformers_model(tmp_path / "out", config)
    assert not any(isinstance(m, QuantLinear) for m in stock.modules())
    batch = batches("llama")[0]
    want = logits(calib.load(source, "fake"), batch)
    error = float((logits(stock, batch) - want).abs().max() / (want.max() - want.min()))
    assert error <= (1e-6 if format == "float" else 2e-3)
    assert json.loads((tmp_path / "out" / "calib.json").read_text())["converted_from"]


GROUPED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 96}
AS_RELEASED: dict[str, Callable[[], Any]] = {  # with the entries that readers take for granted
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=128)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, head_dim=16, sliding_window=16, query_pre_attn_scalar=256)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4)),
}


@pytest.mark.parametrize("kind", AS_RELEASED)
def test_gguf_of_other_architectures(kind: str, tmp_path: Path) -> None:
    from calib.export.verify_worker import transformers_model

    torch.manual_seed(0)
    model: Any = AS_RELEASED[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    scheme: dict[str, Any] = {"weight_group": 32, "weight_symmetric": kind != "gpt2"}
    data = batches("llama")
    result = calib.quantize(model, "w4a16", "rtn", data, samples=8, seq_len=24, progress=False, scheme_options=scheme)
    result.save(tmp_path / "out", "gguf", verified=False)
    stock, _ = transformers_model(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text()))
    want = reference_of(result.model, data[0], "gguf")
    assert float((logits(stock, data[0]) - want).abs().max()) <= 2e-3 * float(want.max() - want.min())


@pytest.mark.slow
def test_the_command_converts_verifies_and_verifies_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export", str(source), "--format", "gguf", "--out", str(tmp_path / "g"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["verify"]["loader"] == "transformers without calib, gguf_file"
    assert answer["verify"]["max_difference"] <= 2e-3
    with (tmp_path / "g" / "model.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert cli.run(["verify", str(tmp_path / "g")]) == VerifyError.exit_code
    assert "model.gguf is not the file that was written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_layout_is_noticed_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awq, "ORDER", tuple(range(8)))
    with pytest.raises(VerifyError, match="out was not written"):
        calib.convert(source, "awq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_quantize_streams_and_writes_another_format(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    result = calib.quantize(
        tmp_path / "model", "w4a16", "rtn", batches("llama"), tmp_path / "out", samples=8, seq_len=24, format="gguf",
        progress=False, scheme_options={"weight_group": 32},
    )  # fmt: skip
    assert result.report["verify"]["loader"] == "transformers without calib, gguf_file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_what_was_computed_outlives_a_format_that_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(gguf, "expressible", lambda _: ["it is Tuesday"])
    with pytest.raises(OutputError, match=r"Tuesday.*what was computed is in .*out-calib"):
        calib.quantize(
            tmp_path / "model", "w4a16", "rtn", batches("llama"), tmp_path / "out", samples=8, seq_len=24,
            format="gguf", progress=False, verified=False, scheme_options={"weight_group": 32},
        )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out-calib"]
    assert any(isinstance(m, QuantLinear) for m in calib.load(tmp_path / "out-calib").modules())


def with_everything(model: Any) -> Any:
    """Every linear input shifted, scaled and rotated, every weight with a side branch; floats go in."""
    generator = torch.Generator().manual_seed(4)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            n, out = module.in_features, module.out_features
            given = module.input
            given.hadamard = 32
            given.shift = torch.randn(n, generator=generator) * 0.1
            given.rescale = torch.rand(n, generator=generator) + 0.5
            a, b = torch.randn(4, n, generator=generator) * 0.01, torch.randn(out, 4, generator=generator)
            module.side = SideBranch.of(b, a, 8 if "q_proj" in name else None, torch.float32)
    return model


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert", "mixtral"])
def test_float_folds_everything_into_the_stock_class(family: str, tmp_path: Path) -> None:
    model: Any = quantized(family).model if family == "mixtral" else quantized(family, "w8a8-static", "os+").model
    if family != "mixtral":  # whose experts have no place for a bias
        drop_inputs(model)
        with_everything(model)
    plain.save(model, None, tmp_path / "out", manifest={})
    batch = batches(family)[0]
    stock = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out")
    want = reference_of(model, batch, "float")
    assert float((logits(stock, batch) - want).abs().max()) <= 1e-4 * float(want.max() - want.min())
    if family == "mixtral":  # the names that the hub's checkpoints have
        names = load_file(tmp_path / "out" / "model.safetensors").keys()
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


NEAREST = "weights only.*use --format compressed-tensors, or --weights-only"
REFUSED: dict[str, tuple[Callable[[], calib.Result], str, str]] = {
    "inputs in GPTQ": (lambda: quantized("llama", "w8a8-static", sites=("norm",)), "gptq", NEAREST),
    "inputs in plain floats": (lambda: quantized("llama", "w8a8"), "float", "weights only"),
    "fused affine": (lambda: quantized("llama", "w8a8-static", "os+"), "awq", "fused"),
    "experts in GPTQ": (lambda: quantized("mixtral"), "gptq", "bare parameter"),
    "experts in a graph": (lambda: quantized("mixtral", "w8a8-static"), "onnx", "experts"),
    "dynamic ranges in a graph": (lambda: quantized("opt", "w8a8"), "onnx", "dynamic"),
    "a family without a GGUF form": (lambda: quantized("opt"), "gguf", "no GGUF form of opt.*use --format"),
    "what readers do not learn": (lambda: quantized("gemma2"), "gguf", "query_pre_attn_scalar"),
    "8 bits in AWQ": (lambda: quantized("opt", "w8a8"), "awq", "8-bit"),
    "planes": (lambda: quantized("llama", "w2a16-fdb"), "gguf", "dual-binary"),
    "a float linear in GPTQ": (lambda: quantized("llama", exclude="q_proj"), "gptq", "left in float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_with_the_nearest(case: str, tmp_path: Path) -> None:
    make, format, words = REFUSED[case]
    result = make()
    with pytest.raises(OutputError, match=words):
        result.save(tmp_path / "out", format, verified=False)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_refused_before_calibration(tmp_path: Path) -> None:
    for scheme, method, family, format, words in (
        ("w8a8", "rtn", "llama", "gguf", "weights only"),
        ("w4a16", "hadamard,gptq", "llama", "gptq", "Hadamard"),
        ("w4a16", "rtn", "opt", "gguf", "no GGUF form of opt.*use --format compressed-tensors"),
        ("w4a16", "rtn", "gpt2", "awq", "Conv1D.*use --format onnx"),
        ("w8a8", "rtn", "bert", "onnx", "dynamic"),
        ("w8a8-static", "rtn", "mixtral", "onnx", "experts"),
        ("w8a8-static weight_group", "rtn", "llama", "onnx", "weights in groups with quantized inputs"),
        ("w8a8-static bfloat16", "rtn", "llama", "onnx", "written in float32"),
        ("w4a16 weight_group", "rtn", "qwen3", "gguf", "do not learn head_dim"),
    ):
        name, *more = scheme.split()
        options: dict[str, Any] = {"scheme_options": {"weight_group": 32}} if "weight_group" in more else {}
        options |= {"dtype": torch.bfloat16} if "bfloat16" in more else {}
        with pytest.raises(InputError, match=words):
            calib.quantize(
                build(family), name, method, batches(family), tmp_path / "out", format=format, progress=False, **options
            )


def test_a_missing_package_names_the_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(InputError, match=r"needs onnxruntime, which is not installed; pip install 'calib\[onnx\]'"):
        calib.convert(source, "onnx", tmp_path / "out")


@pytest.mark.parametrize(
    "family, scheme, method",
    [
        ("bert", "w8a8-static", "rotate,os+"),
        ("opt", "w8a8-static", "os+"),  # its last fc2 is fused with nothing
        pytest.param("llama", "w4a16", "rtn", marks=pytest.mark.slow),
    ],
)
def test_onnx_answers_like_the_model_at_any_shape(family: str, scheme: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    result = quantized(family, scheme, method)
    result.save(tmp_path / "out", "onnx", verified=False)
    for rows, length in ((4, 24), (1, 7)):
        batch = {key: value[:rows, :length].contiguous() for key, value in batches(family)[0].items()}
        batch["attention_mask"][0, length - 2 :] = 0
        want = reference_of(result.model, batch, "onnx")
        got = onnxruntime_answer(tmp_path / "out" / "model.onnx", batch)
        assert float((got - want).abs().max()) <= 2e-2 * float(want.max() - want.min())
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = {tensor.data_type for tensor in graph.initializer if "_codes" in tensor.name}
    assert kinds == {onnx.TensorProto.INT4 if scheme == "w4a16" else onnx.TensorProto.INT8}
    # onnxruntime's session.x64quantprecision, which machines without VNNI need, wants a zero point a weight, its own
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and "int8_codes" in node.input[0]]
    zeros = [node.input[2] for node in weights]
    assert len(set(zeros)) == len(zeros) and bool(zeros) == (scheme != "w4a16")


def test_checkpoints_are_formats_too(source: Path, tmp_path: Path) -> None:
    calib.convert(source, "calib", tmp_path / "again", verified=False)
    first, again = (load_file(f / "model.safetensors") for f in (source, tmp_path / "again"))
    assert all(torch.equal(first[k], again[k]) for k in first) and first.keys() == again.keys()
    with pytest.raises(OutputError, match="to convert"):
        calib.convert(source, "float", source)
    assert (source / REFERENCE).is_file() and checkpoint.FORMAT in targets.WRITERS


@pytest.mark.slow
def test_the_matrix_on_two_families(tmp_path: Path) -> None:
    cells = formats.matrix(["llama", "mixtral"], ["float", "awq", "gguf"], tmp_path)
    verified = {key for key, text in cells.items() if text[0].isdigit()}
    assert verified == {("llama", "float"), ("llama", "awq"), ("llama", "gguf"), ("mixtral", "float")}
    assert "bare parameter" in cells["mixtral", "awq"] and "no GGUF form of mixtral" in cells["mixtral", "gguf"]


def test_the_docs_show_every_cell() -> None:
    text = DOCS.read_text(encoding="utf-8")
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert rows[0][1:] == list(formats.COLUMNS) and {column[0] for column in formats.COLUMNS.values()} == {
        *targets.WRITERS
    }
    assert [row[0] for row in rows[1:]] == list(FAMILIES) and all(all(row) for row in rows[1:])
    assert "FAILED" not in text
