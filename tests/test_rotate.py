"""calib.rotate: the turn is orthogonal, the model answers as before, and what cannot be turned is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import calib
from calib import cli
from calib.errors import InputError, ModelError, OutputError
from calib.export.verify import answer
from calib.model import apply_rewrites, call_model
from calib.model.linears import find_rewrites
from calib.model.residual import find_residual
from calib.solvers import learn_turn
from calib.transforms.residual import rotation
from tests import families
from tests.small import small_model

TURNED = {"llama": False, "opt": True, "gpt2": True, "gpt_neox": True, "qwen3": False, "phi3": False, "mixtral": False}
REFUSED = {
    "bloom": "reads transformer.word_embeddings_layernorm",
    "bert": "reads bert.embeddings.LayerNorm",
    "gemma2": "post_attention_layernorm stands before an addition",
    "bart": "no transformers model of one stack",
}


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 70), st.booleans(), st.integers(0, 9))
def test_a_turn_is_orthogonal_and_keeps_the_ones_where_asked(width: int, keeps_mean: bool, seed: int) -> None:
    turn = rotation(width, keeps_mean, torch.Generator().manual_seed(seed))
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(turn @ ones, ones, atol=1e-12) or not keeps_mean


def test_a_turn_spreads_one_channel_over_all() -> None:
    flat = rotation(64, False, torch.Generator().manual_seed(0))
    assert torch.allclose(flat.abs(), torch.full_like(flat, 1 / 8))
    mean = rotation(64, True, torch.Generator().manual_seed(0))
    assert float(mean.abs().amax()) < 0.6


def test_every_family_is_listed() -> None:
    assert {*TURNED, *REFUSED} == {*families.FAMILIES}


@pytest.mark.parametrize("family", TURNED)
def test_a_turned_model_answers_as_before_and_is_of_the_same_class(family: str, tmp_path: Path) -> None:
    model: Any = families.build(family)
    batch = families.batches(family)[0]
    want = answer(model, batch)
    weight = model.get_input_embeddings().weight.detach().clone()
    found = calib.rotate(model, tmp_path / "out", verified=False, progress=False)
    assert found.difference < 1e-5 and found.keeps_mean == TURNED[family] and found.heads == 16
    assert not torch.allclose(model.get_input_embeddings().weight, weight, atol=1e-2)
    assert torch.allclose(model.get_input_embeddings().weight.norm(dim=1), weight.norm(dim=1), rtol=1e-4)
    again = type(families.build(family)).from_pretrained(tmp_path / "out").eval()
    assert float((answer(again, batch) - want).abs().amax()) <= 1e-5 * float(want.amax() - want.amin())
    assert again.config.tie_word_embeddings is False
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_turned_is_refused_by_name(family: str) -> None:
    model = families.build(family)
    batch = families.batches(family)[0]
    want = answer(model, batch)
    with pytest.raises((ModelError, InputError), match=rf"{REFUSED[family]}.*--method rotate"):
        calib.rotate(model, progress=False)
    assert torch.allclose(answer(model, batch), want, atol=1e-6)


def inputs_of_norms(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Peak over root mean square of what the norms' readers see, the largest."""
    apply_rewrites(model, find_rewrites(model, batch))
    peaks: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        peaks.append(args[0].abs().amax() / args[0].square().mean().sqrt())

    norms = find_residual(model, batch).norms.values()
    handles = [reader.register_forward_pre_hook(note) for norm in norms for reader in norm.readers]
    with torch.no_grad():
        call_model(model, batch)
    for handle in handles:
        handle.remove()
    return torch.stack(peaks).amax()


def test_outliers_of_the_stream_are_gone() -> None:
    model = families.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 7] *= 60
    batch = families.batches("llama")[0]
    before = inputs_of_norms(model, batch)
    calib.rotate(model, progress=False)
    assert float(inputs_of_norms(model, batch)) < 0.6 * float(before)


def test_heads_may_stay() -> None:
    model: Any = families.build("llama")
    found = calib.rotate(model, heads=False, progress=False)
    assert found.heads == 0 and found.difference < 1e-5


def test_a_gain_of_zero_sends_the_bias_to_the_readers(tmp_path: Path) -> None:
    """The head has no bias, and the norm can keep none: it answers as before, and the class has no place for it."""
    model: Any = families.build("gpt2")
    batch = families.batches("gpt2")[0]
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0.0
        model.transformer.ln_f.bias.normal_()
    want = answer(model, batch)
    calib.rotate(model, progress=False)
    assert torch.allclose(answer(model, batch), want, atol=1e-4)
    again: Any = families.build("gpt2")
    with torch.no_grad():
        again.transformer.ln_f.weight[3] = 0.0
        again.transformer.ln_f.bias.normal_()
    with pytest.raises(OutputError, match=r"no place for lm_head\.bias"):
        calib.rotate(again, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_reader_that_is_missed_is_found_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        found = find_residual(model, batch)
        next(iter(found.norms.values())).readers.pop()
        return found

    monkeypatch.setitem(calib.rotate.__globals__, "find_residual", forgetful)
    with pytest.raises(ModelError, match="answers otherwise after the turn"):
        calib.rotate(families.build("llama"), progress=False)


def test_the_command_and_a_stock_checkpoint_of_its_result(
    tmp_path: Path, byte_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = small_model(tmp_path, byte_tokenizer)
    turned = str(tmp_path / "turned")
    assert cli.run(["rotate", small["model"], "--out", turned, "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["width"] == 32 and said["verify"]["max_difference"] < 1e-4
    manifest = json.loads((tmp_path / "turned" / "calib.json").read_text())
    assert manifest["rotated"]["seed"] == 0 and "sha256" in manifest
    calib.quantize(
        turned, "w8a8", "os+,gptq", small["train.txt"], out=tmp_path / "out", format="compressed-tensors",
        samples=4, seq_len=32, progress=False, report=False,
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert cli.run(["rotate", turned, "--out", str(tmp_path)]) == 6
    assert "--overwrite" in capsys.readouterr().err


def outlying(n: int, seed: int) -> Tensor:
    """Rows of a few directions with large entries, which no Hadamard matrix knows of."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, n, generator=draw)
    rows = torch.randn(512, n, generator=draw)
    return rows + 6 * torch.randn(512, 4, generator=draw) @ directions


@settings(deadline=None, max_examples=10)
@given(st.integers(4, 40), st.booleans(), st.integers(0, 9))
def test_a_learned_turn_is_orthogonal_and_never_costs_more(width: int, keeps_mean: bool, seed: int) -> None:
    rows = outlying(width, seed)
    rows = rows - rows.mean(1, keepdim=True) if keeps_mean else rows
    start = rotation(width, keeps_mean, torch.Generator().manual_seed(seed))
    found = learn_turn(rows, torch.ones(512), start, 20, seed, keeps_mean=keeps_mean)
    assert torch.allclose(found.turn @ found.turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(found.turn @ ones, ones, atol=1e-12) or not keeps_mean
    assert found.after <= found.before


def test_a_turn_learns_what_a_random_one_cannot_know() -> None:
    rows, start = outlying(32, 0), rotation(32, False, torch.Generator().manual_seed(0))
    found = learn_turn(rows, torch.ones(512), start, 100, keeps_mean=False)
    assert found.after < 0.9 * found.before


def test_rows_that_weigh_nothing_leave_the_start() -> None:
    start = rotation(8, False, torch.Generator().manual_seed(0))
    for rows, worth in ((torch.zeros(64, 8), torch.ones(64)), (torch.randn(64, 8), torch.zeros(64))):
        assert torch.equal(learn_turn(rows, worth, start, 5, keeps_mean=False).turn, start)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_learned_turn_answers_as_before_and_lowers_what_rounding_costs(family: str) -> None:
    model: Any = families.build(family)
    batch = families.batches(family)[0]
    want = answer(model, batch)
    found = calib.rotate(model, learn=40, data=families.batches(family), samples=8, seq_len=16, progress=False)
    assert found.learned is not None and found.learned.after < found.learned.before and found.difference < 1e-5
    assert torch.allclose(answer(model, batch), want, atol=1e-5 * float(want.amax() - want.amin()))


def test_the_same_seed_learns_the_same_turn() -> None:
    turns = [
        calib.rotate(families.build("llama"), learn=3, data=families.batches("llama"), seq_len=16, progress=False)
        for _ in range(2)
    ]
    first, second = (found.learned for found in turns)
    assert first is not None and second is not None and torch.equal(first.turn, second.turn)


def test_data_without_learning_are_refused() -> None:
    with pytest.raises(InputError, match=r"reads no data.*--learn"):
        calib.rotate(families.build("llama"), data=["text"], progress=False)


def test_the_command_learns(tmp_path: Path, byte_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = small_model(tmp_path, byte_tokenizer)
    command = ["rotate", small["model"], "--out", str(tmp_path / "out"), "--learn", "5", "--data", small["train.txt"]]
    assert cli.run([*command, "--samples", "4", "--seq-len", "32", "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any("of a random turn's" in line for line in shown)
    learned = json.loads(shown[-1])["learned"]
    assert 0 < learned["after"] <= learned["before"]
    assert json.loads((tmp_path / "out" / "calib.json").read_text())["rotated"]["learned"] == learned
