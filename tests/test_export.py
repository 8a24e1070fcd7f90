"""Checkpoints: what is written comes back, in a fresh process and without calib where it is stock; refusals
are named.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import calib
from calib.errors import ModelError, OutputError, VerifyError
from calib.export import checkpoint, compressed, files, hf
from calib.export.verify import REFERENCE, answer, reference_batch
from calib.model.linears import apply_rewrites, find_rewrites
from calib.nn import ActivationQuantizer, Prefix, QuantLinear
from calib.quantizers import AffineSpec as Spec
from calib.quantizers import Float8Spec, qparams
from tests import families

W8, W8T, W6, W4G = (
    Spec(8),
    Spec(8, granularity="tensor"),
    Spec(6),
    Spec(4, granularity="group", group_size=32),
)
W4GA, W3 = Spec(4, symmetric=False, granularity="group", group_size=32), Spec(3)
STATIC = Spec(8, symmetric=False, granularity="tensor")
TOKEN = Spec(8, symmetric=False, granularity="token", dynamic=True)
F8, F8S, F8T = Float8Spec(), Float8Spec(granularity="tensor"), Float8Spec(granularity="token", dynamic=True)
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, **changes})).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPE)).eval()


def rewritten(model: nn.Module) -> nn.Module:
    rewrites = find_rewrites(model, {"input_ids": IDS})
    apply_rewrites(model, rewrites)
    model.calib_rewrites = rewrites  # type: ignore[assignment]
    return model.eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return rewritten(GPT2LMHeadModel(config).eval())


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return rewritten(MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)).eval())


def quantized(
    model: Any,
    weights: Spec,
    inputs: Spec | None,
    *,
    skip: str = "lm_head classifier",
    bias: str = "",
    **options: Any,
) -> Any:
    """Every linear that ``skip`` does not name, quantized to nearest with made-up ranges; ``bias`` names get
    a bias.
    """
    generator = torch.Generator().manual_seed(2)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or any(part in name for part in skip.split()):
            continue
        quantizer = ActivationQuantizer(inputs, module.in_features, **options)
        if inputs is not None and not inputs.dynamic:
            scale, zero_point = qparams(torch.tensor(-2.7), torch.tensor(3.1), inputs)
            quantizer.scale, quantizer.zero_point = scale.reshape(1), zero_point.reshape(1)
        if options.get("shift"):
            quantizer.shift = torch.randn(module.in_features, generator=generator) * 0.1
        if options.get("rescale"):
            quantizer.rescale = torch.rand(module.in_features, generator=generator) + 0.5
        gains = any(part in name for part in bias.split())
        new_bias = torch.randn(module.out_features, generator=generator) * 0.1 if gains else module.bias
        parent, _, leaf = name.rpartition(".")
        linear = QuantLinear.from_float(module.weight.detach(), new_bias, weights, quantizer)
        setattr(model.get_submodule(parent), leaf, linear)
    return model


def prefixed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    keys, values = ([torch.randn(1, 2, 2, 16, generator=generator) for _ in range(2)] for _ in range(2))
    Prefix.from_tensors([5, 7], keys, values).install(model)
    return model


def with_plain_bias(model: Any) -> Any:
    v = model.model.layers[1].self_attn.v_proj
    v.bias = nn.Parameter(torch.linspace(-1, 1, v.out_features))
    return model


def logits(model: nn.Module) -> Tensor:
    return answer(model, {"input_ids": IDS})


OWN: dict[str, Callable[[], Any]] = {
    "static with biases, tied": lambda: quantized(llama(tie_word_embeddings=True), W8, STATIC, bias="v_proj o_proj"),
    "dynamic": lambda: quantized(llama(), W8T, TOKEN),
    "w4 group asymmetric": lambda: quantized(llama(tie_word_embeddings=True), W4GA, None),
    "quantized head of a tied model": lambda: quantized(llama(tie_word_embeddings=True), W3, None, skip="none"),
    "8-bit head of a tied model": lambda: quantized(llama(tie_word_embeddings=True), W8, None, skip="none"),
    "fused affine, hadamard, float rows": lambda: quantized(
        llama(), W6, STATIC, shift=True, rescale=True, hadamard=32, float_rows=True
    ),
    "prefix": lambda: prefixed(quantized(llama(), W8, STATIC)),
    "a float linear that gained a bias": lambda: with_plain_bias(quantized(llama(), W8, STATIC, skip="lm_head v_proj")),
    "bert": lambda: quantized(bert(), W8, STATIC, shift=True),
    "conv1d": lambda: quantized(gpt2(), W8, STATIC),
    "experts": lambda: quantized(mixtral(), W8, TOKEN),
    "float8, fused affine, hadamard": lambda: quantized(llama(), F8, F8S, shift=True, rescale=True, hadamard=32),
    "float8 inputs of integer weights": lambda: quantized(gpt2(), W4G, F8T),
}


@pytest.mark.parametrize("case", OWN)
def test_own_format_gives_the_model_back(case: str, tmp_path: Path) -> None:
    model = OWN[case]()
    expected = logits(model)
    checkpoint.save(model, None, tmp_path / "out", manifest={"case": case})
    assert calib.load(tmp_path / "out", mode="fake").training is False
    loaded = calib.load(tmp_path / "out", mode="fake")
    assert torch.equal(logits(loaded), expected)
    have, want = loaded.state_dict(), model.state_dict()
    assert have.keys() == want.keys()
    assert all(have[k].dtype == want[k].dtype and torch.equal(have[k], want[k]) for k in want)
    packed = logits(hf.set_mode(loaded, "packed"))  # sums in another order, so a code may flip, and this model is tiny
    assert float((packed - expected).abs().max()) <= 1e-2 * float(expected.max() - expected.min())


STOCK = {"llama", "opt", "bloom", "bert", "gpt_neox", "qwen3", "gemma2", "phi3", "bart"}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_comes_back_exactly(family: str, tmp_path: Path) -> None:
    batch = families.batches(family)[0]
    model: Any = families.build(family)
    model.calib_rewrites = find_rewrites(model, batch)
    apply_rewrites(model, model.calib_rewrites)
    model = quantized(model, W8, STATIC)
    expected = answer(model, batch)
    checkpoint.save(model, None, tmp_path / "own", manifest={})
    assert torch.equal(answer(calib.load(tmp_path / "own", mode="fake"), batch), expected)
    assert (compressed.expressible(model) == []) == (family in STOCK)
    if family in STOCK:
        compressed.save(model, None, tmp_path / "stock", manifest={})
        assert torch.equal(answer(calib.load(tmp_path / "stock", mode="fake"), batch), expected)
        simulated = answer(hf.set_mode(model, "float"), batch)
        assert torch.equal(answer(type(model).from_pretrained(tmp_path / "stock"), batch), simulated)


def test_stock_from_pretrained_loads_it_packed_and_saves_it_again(tmp_path: Path) -> None:
    model = prefixed(quantized(llama(tie_word_embeddings=True), W8, STATIC, bias="v_proj o_proj"))
    checkpoint.save(model, None, tmp_path / "out", manifest={})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {m.mode for m in loaded.modules() if isinstance(m, QuantLinear)} == {"packed"}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(calib.load(tmp_path / "again", mode="fake")), logits(model))
    prompt = IDS[:1, :4]
    generated = [m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, hf.set_mode(loaded, "fake"))]
    assert torch.equal(*generated)
    headless = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(headless.layers[0].mlp.down_proj, QuantLinear)


def test_bfloat16_keeps_scales_in_float32(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    model = quantized(model, W8, STATIC, shift=True)
    checkpoint.save(model, None, tmp_path / "out", manifest={})
    loaded = calib.load(tmp_path / "out", mode="fake")
    layer = loaded.model.layers[0].mlp.up_proj  # type: ignore[union-attr,index]
    assert loaded.dtype == torch.bfloat16
    assert layer.weight_scale.dtype == layer.input.scale.dtype == layer.input.shift.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SHARD", 60_000)
    model = quantized(llama(), W8, STATIC)
    checkpoint.save(model, None, tmp_path / "out", manifest={})
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert len(json.loads((tmp_path / "out" / "calib.json").read_text())["sha256"]) > 1
    assert torch.equal(logits(calib.load(tmp_path / "out", mode="fake")), logits(model))


CT: dict[str, Callable[[], Any]] = {
    "static with biases, tied": lambda: quantized(llama(tie_word_embeddings=True), W8, STATIC, bias="v_proj o_proj"),
    "static, tensor weights": lambda: quantized(llama(), W8T, STATIC),
    "static, asymmetric weights": lambda: quantized(llama(), Spec(8, symmetric=False), STATIC),
    "dynamic": lambda: quantized(llama(), W8, TOKEN),
    "w4a8 group": lambda: quantized(llama(), W4G, TOKEN),
    "w4a16 group with biases, tied": lambda: quantized(llama(tie_word_embeddings=True), W4G, None, bias="down_proj"),
    "w3a16 channel": lambda: quantized(llama(), W3, None),
    "w8a16": lambda: quantized(llama(), W8, None),
    "two schemes": lambda: quantized(quantized(llama(), W8, STATIC, skip="lm_head mlp"), W4G, None),
    "bert": lambda: quantized(bert(), W8, STATIC),
    "float8 static with biases, tied": lambda: quantized(
        llama(tie_word_embeddings=True), F8, F8S, bias="v_proj o_proj"
    ),
    "float8 dynamic": lambda: quantized(llama(), F8, F8T),
    "float8 one scale, weights only": lambda: quantized(llama(), F8S, None),
    "float8 bert": lambda: quantized(bert(), F8, F8S),
}
STRANGER = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    stored = load_file(folder / "verify" / "expected.safetensors")
    with torch.no_grad():
        got = model(input_ids=stored["ids"]).logits
    span = stored["logits"].max() - stored["logits"].min()
    error = float((got - stored["logits"]).abs().max() / span)
    print("RESULT", json.dumps([folder.name, error, any(info.values())]))
assert "calib" not in sys.modules
"""


def test_compressed_tensors_loads_in_a_process_that_never_saw_calib(tmp_path: Path) -> None:
    for number, make in enumerate(CT.values()):
        model = make()
        assert compressed.expressible(model) == []
        folder = compressed.save(model, None, tmp_path / "all" / f"{number:02d}", manifest={})
        (folder / "verify").mkdir()
        save_file(
            {"ids": IDS, "logits": logits(hf.set_mode(model, "float"))}, folder / "verify" / "expected.safetensors"
        )
    child = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "all")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    results = [json.loads(line[7:]) for line in child.stdout.splitlines() if line.startswith("RESULT")]
    names = dict(zip([f"{i:02d}" for i in range(len(CT))], CT, strict=True))
    assert len(results) == len(CT)
    for folder_name, difference, complaints in results:
        assert difference <= 1e-5, (names[folder_name], difference)
        assert not complaints, names[folder_name]


@pytest.mark.parametrize("case", CT)
def test_calib_runs_compressed_tensors_on_its_own_linears(case: str, tmp_path: Path) -> None:
    model = CT[case]()
    expected = logits(model)
    compressed.save(model, None, tmp_path / "out", manifest={})
    loaded = calib.load(tmp_path / "out", mode="fake")
    kinds = {n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert kinds == {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert torch.equal(logits(loaded), expected)
    packed = logits(hf.set_mode(loaded, "packed"))
    assert float((packed - expected).abs().max()) <= 1e-2 * float(expected.max() - expected.min())
    rewrite_tensors(
        tmp_path / "out",
        lambda t: t.pop(next(key for key in t if key.endswith("LayerNorm.weight") or key.endswith("layernorm.weight"))),
    )
    with pytest.raises(ModelError, match="is missing"):
        calib.load(tmp_path / "out")


def test_foreign_compressed_tensors_grids_are_left_to_their_package(tmp_path: Path) -> None:
    compressed.save(quantized(llama(), W8, TOKEN), None, tmp_path / "out", manifest={})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    loaded = calib.load(tmp_path / "out")
    assert not any(isinstance(m, QuantLinear) for m in loaded.modules())
    assert logits(loaded).isfinite().all()


def test_compressed_tensors_layout(tmp_path: Path) -> None:
    model = quantized(llama(tie_word_embeddings=True), W8, STATIC, bias="v_proj o_proj")
    compressed.save(model, None, tmp_path / "out", manifest={"recipe": 1})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    q = "model.layers.0.self_attn.q_proj"
    assert config["attention_bias"] is True and config["mlp_bias"] is False
    assert not tensors[f"{q}.bias"].any()  # switched on with v's and o's, zero
    assert tensors[f"{q}.weight"].dtype == tensors[f"{q}.input_zero_point"].dtype == torch.int8
    assert tensors[f"{q}.weight_scale"].shape == (64, 1) and tensors[f"{q}.input_scale"].shape == (1,)
    assert "lm_head.weight" not in tensors
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["format"] == "int-quantized"
    assert json.loads((tmp_path / "out" / "calib.json").read_text())["recipe"] == 1


def test_float8_layout(tmp_path: Path) -> None:
    compressed.save(quantized(llama(), F8, F8S), None, tmp_path / "out", manifest={})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    group = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    q = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{q}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{q}.weight_scale"].shape == (64, 1) and tensors[f"{q}.input_scale"].shape == (1,)
    assert not any("zero_point" in key for key in tensors)
    assert group["format"] == "float-quantized"
    assert {group[side]["type"] for side in ("weights", "input_activations")} == {"float"}


class NoRoom(LlamaForCausalLM):
    """A class whose config has no flag for biases."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "prefix": (lambda: prefixed(quantized(llama(), W8, STATIC)), "prefix"),
    "shift": (lambda: quantized(llama(), W8, STATIC, shift=True), "fused"),
    "rescale": (lambda: quantized(llama(), W8, STATIC, rescale=True), "fused"),
    "hadamard": (lambda: quantized(llama(), W8, STATIC, hadamard=32), "Hadamard"),
    "float rows": (lambda: quantized(llama(), W8, STATIC, float_rows=True), "float"),
    "conv1d": (lambda: quantized(gpt2(), W8, STATIC), "Conv1D"),
    "experts": (lambda: quantized(mixtral(), W8, STATIC), "parameter"),
    "narrow symmetric inputs": (lambda: quantized(llama(), W8, Spec(8, granularity="tensor")), "narrow"),
    "pooler": (lambda: quantized(bert(), W8, TOKEN), "2-dimensional"),
    "packed zero points": (lambda: quantized(llama(), W4GA, None), "zero points"),
    "bfloat16": (lambda: quantized(llama().bfloat16(), W8, None), "bfloat16"),
    "nothing quantized": (llama, "no linear"),
    "no flag": (lambda: quantized(llama(), W8, STATIC, bias="lm_head", skip="none"), "lm_head.bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_compressed_tensors_refuses_by_name(case: str, tmp_path: Path) -> None:
    make, word = REFUSED[case]
    model = make()
    assert any(word in reason for reason in compressed.expressible(model))
    with pytest.raises(OutputError, match=word):
        compressed.save(model, None, tmp_path / "out", manifest={})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(quantized(llama(), W8, STATIC), None, tmp_path / "out", manifest={})


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.1.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors is truncated"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"junk" * 99),
        "model.safetensors is truncated",
    ),
    "tensor missing": (
        lambda f: rewrite_tensors(f, lambda t: t.pop(f"{Q}.weight_scale")),
        f"{Q}.weight_scale is missing",
    ),
    "tensor extra": (lambda f: rewrite_tensors(f, lambda t: t.update(x=IDS)), "tensor x is not part"),
    "tensor shape": (
        lambda f: rewrite_tensors(f, lambda t: t.update({f"{Q}.input.scale": torch.ones(2)})),
        f"{Q}.input.scale has shape",
    ),
    "version": (lambda f: edit_config(f, lambda c: c.update(format_version=99)), "format version 99"),
    "unknown key": (lambda f: edit_config(f, lambda c: c.update(rotation=1)), "unknown keys"),
    "unknown target": (
        lambda f: edit_config(f, lambda c: c["groups"][0]["targets"].append("model.x")),
        "no model.x",
    ),
    "strange spec": (
        lambda f: edit_config(f, lambda c: c["groups"][0]["weights"].update(odd=1)),
        "does not fit",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(case: str, saved: Path) -> None:
    damage, words = DAMAGE[case]
    damage(saved)
    with pytest.raises(ModelError) as caught:
        calib.load(saved)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_output_folder_that_holds_something_else(tmp_path: Path) -> None:
    model = quantized(llama(), W8, STATIC)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        checkpoint.save(model, None, tmp_path / "thesis", manifest={})
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        checkpoint.save(model, None, tmp_path / "file", manifest={})
    checkpoint.save(model, None, tmp_path / "file", manifest={}, overwrite=True)
    checkpoint.save(model, None, tmp_path / "thesis", manifest={}, overwrite=True)
    checkpoint.save(model, None, tmp_path / "thesis", manifest={"second": True})  # its own output may be replaced
    assert json.loads((tmp_path / "thesis" / "calib.json").read_text())["second"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis"]


def test_a_folder_with_more_than_a_model_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(OutputError, match="never replaced"):
        files.check_out(tmp_path, overwrite=True)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(llama(), W8, STATIC)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        checkpoint.save(model, None, tmp_path / "out", manifest={})
    monkeypatch.setattr(files, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(model, None, tmp_path / "out", manifest={})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="MiB free"):
        checkpoint.save(quantized(llama(), W8, STATIC), None, tmp_path / "out", manifest={})


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(OutputError, match="cannot write"):
        files.check_out("/proc/nobody/out")


def test_changes_no_checkpoint_can_hold_are_named(tmp_path: Path) -> None:
    model = quantized(llama(), W8, STATIC)
    model.model.layers[0].extra = nn.Linear(3, 3)
    with pytest.raises(OutputError, match=r"layers\.0\.extra\.(bias|weight)"):
        checkpoint.save(model, None, tmp_path / "out", manifest={})
    with pytest.raises(OutputError, match="not a transformers model"):
        checkpoint.save(nn.Sequential(nn.Linear(2, 2)), None, tmp_path / "out", manifest={})


def test_verify_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prefixed(quantized(llama(), W8, STATIC))
    folder = checkpoint.save(model, None, tmp_path / "own", manifest={})
    inputs = reference_batch({"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.zeros(2)})
    assert list(inputs) == ["input_ids", "attention_mask"]
    expected = answer(model, inputs)
    report = calib.verify(folder, expected, inputs, tolerance=1e-2)
    assert report.top1 >= 0.99 and report.positions == IDS.numel()
    assert report.kernel_difference is not None and report.kernel_difference <= 1e-5
    answers = {"logits": expected, "packed": expected, "kernels": torch.tensor([1e-6])}
    monkeypatch.setattr("calib.export.verify._fresh_answers", lambda *_: {folder: (answers, "a stand-in")})
    assert calib.verify(folder).max_difference == 0.0
    answers["kernels"] = torch.tensor([1e-2])
    with pytest.raises(VerifyError, match="kernel"):
        calib.verify(folder)
    stored = load_file(folder / REFERENCE)
    stored["logits"] = stored["logits"] + 0.01 * (expected.max() - expected.min())
    save_file(stored, folder / REFERENCE)
    with pytest.raises(VerifyError, match="of the logit range"):
        calib.verify(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(VerifyError, match="sha256"):
        calib.verify(folder)


def test_verify_needs_a_reference(saved: Path) -> None:
    with pytest.raises(ModelError, match="reference"):
        calib.verify(saved)
