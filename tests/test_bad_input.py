"""Bad input, at the command line and in Python: one line of cause and fix, an exit code, nothing left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import calib
from calib import cli
from calib.engine import Engine
from calib.errors import (
    CalibError,
    DataError,
    InputError,
    ModelError,
    NumericsError,
    OutputError,
    VerifyError,
)
from calib.export import files, verify
from tests.families import batches, build

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while. "
SHAPE = dict(  # noqa: C408
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
)
COMMON = ["--samples", "4", "--seq-len", "32", "--batch-size", "2", "--auto-seconds", "0", "--quiet"]
Change = Callable[[dict[str, Tensor]], None]


class Zoo:
    """Tiny random models with a byte tokenizer, each saved once; changed copies of them."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def _save(self, name: str, make: Callable[[int], t.PreTrainedModel], tokenizer: bool = True) -> Path:
        path = self.folder / name
        if not path.exists():
            torch.manual_seed(0)
            t.logging.disable_progress_bar()  # nothing of ours may stand on the captured stderr
            make(len(self.tokenizer)).save_pretrained(path)
            if tokenizer:
                self.tokenizer.save_pretrained(path)
        return path

    @property
    def llama(self) -> Path:
        return self._save("llama", lambda v: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=v, **SHAPE)))

    @property
    def bert(self) -> Path:
        config = {**SHAPE, "num_labels": 2}
        return self._save("bert", lambda v: t.BertForSequenceClassification(t.BertConfig(vocab_size=v, **config)))

    def gpt2(self, layers: int = 1) -> Path:
        """Without layers nothing in it is linear."""
        sizes = dict(n_embd=32, n_layer=layers, n_head=2, n_positions=128)  # noqa: C408
        kind = t.GPT2LMHeadModel if layers else t.GPT2Model
        return self._save(f"gpt2-{layers}", lambda v: kind(t.GPT2Config(vocab_size=v, **sizes)))

    @property
    def headless(self) -> Path:
        """A head and no layers."""
        config = {**SHAPE, "num_hidden_layers": 0}
        return self._save("flat", lambda v: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=v, **config)))

    @property
    def small_vocabulary(self) -> Path:
        return self._save("small", lambda v: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=40, **SHAPE)))

    @property
    def without_tokenizer(self) -> Path:
        make = lambda v: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=v, **SHAPE))  # noqa: E731
        return self._save("mute", make, tokenizer=False)

    def changed(self, box: Path, change: Change) -> Path:
        """A copy of the llama with other tensors."""
        path = box / "model"
        shutil.copytree(self.llama, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"), byte_tokenizer)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder for inputs; what a command writes goes beside it."""
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration fails the test: what is wrong is known before it."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("calibration started")

    monkeypatch.setattr(Engine, "run", started)


def one_line(captured: Any, *words: str) -> None:
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    cause, _, fix = lines[0].partition("; ")
    assert cause and fix, "cause and fix"
    for word in words:
        assert word in lines[0], lines[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def folder_with(given: Path, **contents: str | bytes) -> Path:
    path = given / "folder"
    path.mkdir()
    for name, content in contents.items():
        write(path / name.replace("__", "."), content)
    return path


def poisoned(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith(name))
        tensors[key].view(-1)[7] = value

    return change


# What is asked for: (model, further arguments) -> exit code and words of the message. All before calibration.
Make = Callable[[Zoo, Path], tuple[Path | str, list[str]]]
REQUESTS: dict[str, tuple[Make, int, tuple[str, ...]]] = {
    "scheme": (lambda z, g: (z.llama, ["--scheme", "w9a9"]), 2, ("w9a9", "w8a8-static")),
    "method": (lambda z, g: (z.llama, ["--method", "os+,magic"]), 2, ("magic", "smoothquant")),
    "no method": (lambda z, g: (z.llama, ["--method", ","]), 2, ("no method", "os+")),
    "method value": (
        lambda z, g: (z.llama, ["--method", "smoothquant:7"]),
        2,
        ("7", "0..1", "smoothquant:0.8"),
    ),
    "method word": (lambda z, g: (z.llama, ["--method", "smoothquant:big"]), 2, ("big", "not a number")),
    "method nan": (lambda z, g: (z.llama, ["--method", "smoothquant:nan"]), 2, ("nan", "0..1")),
    "method without value": (lambda z, g: (z.llama, ["--method", "gptq:3"]), 2, ("gptq takes no value",)),
    "hadamard block": (lambda z, g: (z.llama, ["--method", "hadamard:x"]), 2, ("hadamard:x",)),
    "hadamard divides": (lambda z, g: (z.llama, ["--method", "hadamard:128"]), 2, ("does not divide 64",)),
    "model name": (lambda z, g: ("smollm-135m", []), 2, ("smollm-135m", "did you mean 'smollm2-135m'")),
    "hub name": (lambda z, g: ("nobody/nothing", []), 3, ("nobody/nothing", "check the name")),
    "empty name": (lambda z, g: ("", []), 2, ("model name is empty",)),
    "model folder": (lambda z, g: (g / "nowhere", []), 2, ("nowhere", "check the path")),
    "empty folder": (lambda z, g: (folder_with(g), []), 3, ("config.json", "save_pretrained")),
    "config only": (lambda z, g: (folder_with(g, config__json="{}"), []), 3, (".safetensors",)),
    "config is no JSON": (
        lambda z, g: (folder_with(g, config__json="{{", model__safetensors=b""), []),
        3,
        ("config",),
    ),
    "model file": (lambda z, g: (g / "text.txt", []), 2, ("is a file",)),
    "group size": (
        lambda z, g: (z.llama, ["--scheme", "w4a16", "--weights-group", "24"]),
        2,
        ("group size 24", "32 inputs", "layers.0.self_attn", "exclude the layer"),
    ),
    "rule that matches nothing": (
        lambda z, g: (z.llama, ["--exclude", "nose"]),
        2,
        ("'nose'", "names look like"),
    ),
    "rule that is no pattern": (lambda z, g: (z.llama, ["--exclude", "("]), 2, ("'('", "regular expression")),
    "rule that matches all": (lambda z, g: (z.llama, ["--exclude", "."]), 2, ("nothing is left", "relax")),
    "sites": (lambda z, g: (z.llama, ["--sites", "norm,nose"]), 2, ("'nose'", "fused")),
    "sites twice": (lambda z, g: (z.llama, ["--sites", "exact,fused"]), 2, ("exact", "alone")),
    "shift": (lambda z, g: (z.llama, ["--shift", "maybe"]), 2, ("'maybe'", "auto, on, off")),
    "scale": (lambda z, g: (z.llama, ["--scale", "auto"]), 2, ("'auto'", "on, off")),
    "search": (lambda z, g: (z.llama, ["--search", "slow"]), 2, ("'slow'", "exhaustive")),
    "inputs": (lambda z, g: (z.llama, ["--inputs", "half"]), 2, ("'half'", "quantized, float")),
    "granularity": (lambda z, g: (z.llama, ["--acts-granularity", "row"]), 2, ("'row'", "tensor, token")),
    "range": (lambda z, g: (z.llama, ["--weights-range", "best"]), 2, ("'best'", "percentile")),
    "range that is dynamic": (
        lambda z, g: (z.llama, ["--scheme", "w8a8", "--acts-range", "mse"]),
        2,
        ("dynamic", "w8a8-static"),
    ),
    "float rows, dynamic": (
        lambda z, g: (z.llama, ["--scheme", "w8a8", "--float-rows", "0.1"]),
        2,
        ("static range", "w8a8-static"),
    ),
    "activations in float": (
        lambda z, g: (z.llama, ["--scheme", "w4a16", "--acts-symmetric"]),
        2,
        ("in float", "w8a8"),
    ),
    "kv bits": (lambda z, g: (z.llama, ["--kv-bits", "9"]), 2, ("2 to 8 bits", "9")),
    "attention bits": (lambda z, g: (z.llama, ["--attention-bits", "1"]), 2, ("2 to 8 bits",)),
    "damp": (lambda z, g: (z.llama, ["--damp", "-1"]), 2, ("--damp",)),
    "prefix of an encoder": (lambda z, g: (z.bert, ["--prefix", "1"]), 2, ("prefix", "--prefix none")),
    "prefix text, no tokenizer": (
        lambda z, g: (z.without_tokenizer, ["--prefix", "hello"]),
        2,
        ("no tokenizer", "--prefix 1"),
    ),
    "empty prefix": (lambda z, g: (z.llama, ["--prefix", ""]), 2, ("no tokens", "auto, on, none")),
    "prefix token": (lambda z, g: (z.llama, ["--prefix", "1,9999"]), 2, ("9999", "vocabulary of 258")),
    "prefix and windows": (
        lambda z, g: (z.gpt2(), ["--prefix", "1,2", "--seq-len", "128"]),
        2,
        ("windows of 128", "--seq-len 126"),
    ),
    "windows": (lambda z, g: (z.llama, ["--seq-len", "129"]), 2, ("129", "at most 128")),
    "stock with prefix": (
        lambda z, g: (z.llama, ["--format", "compressed-tensors", "--prefix", "1"]),
        2,
        ("prefix", "--format calib"),
    ),
    "stock with fused sites": (
        lambda z, g: (z.llama, ["--format", "compressed-tensors", "--sites", "all"]),
        2,
        ("fused", "--format calib"),
    ),
    "stock with hadamard": (
        lambda z, g: (z.llama, ["--format", "compressed-tensors", "--method", "hadamard"]),
        2,
        ("Hadamard", "--format calib"),
    ),
    "stock with float rows": (
        lambda z, g: (z.llama, ["--format", "compressed-tensors", "--float-rows", "0.1"]),
        2,
        ("rows", "--format calib"),
    ),
    "stock with kv bits": (
        lambda z, g: (z.llama, ["--format", "compressed-tensors", "--kv-bits", "8"]),
        2,
        ("cache", "--format calib"),
    ),
    "stock with symmetric activations": (
        lambda z, g: (z.llama, ["--format", "compressed-tensors", "--acts-symmetric"]),
        2,
        ("narrow grid", "--format calib"),
    ),
    "stock with packed zero points": (
        lambda z, g: (
            z.llama,
            ["--format", "compressed-tensors", "--scheme", "w4a16", "--weights-asymmetric"],
        ),
        2,
        ("zero points", "--format calib"),
    ),
    "stock in half precision": (
        lambda z, g: (z.llama, ["--format", "compressed-tensors", "--dtype", "bfloat16"]),
        2,
        ("bfloat16", "--format calib"),
    ),
    "stock with Conv1D": (
        lambda z, g: (z.gpt2(), ["--format", "compressed-tensors"]),
        2,
        ("Conv1D", "transformer.h.0.attn.c_attn", "--format calib"),
    ),
    "no linears": (lambda z, g: (z.gpt2(layers=0), []), 3, ("no linear layers", "Conv1D")),
    "no blocks": (lambda z, g: (z.headless, []), 3, ("no chain of repeated layers", "nn.ModuleList")),
    "vocabulary": (lambda z, g: (z.small_vocabulary, []), 4, ("token id", "40 entries", "tokenizer")),
    "no tokenizer": (lambda z, g: (z.without_tokenizer, []), 4, ("no tokenizer", "input_ids")),
    "truncated weights": (
        lambda z, g: (damaged(z, g, lambda b: b[: len(b) // 2]), []),
        3,
        ("model.safetensors is truncated", "download or save"),
    ),
    "weights that are none": (
        lambda z, g: (damaged(z, g, lambda b: b"\xff" * 99), []),
        3,
        ("model.safetensors", "not safetensors", "download or save"),
    ),
    "tokenizer that is none": (
        lambda z, g: (damaged(z, g, lambda b: b"{}", "tokenizer.json"), []),
        3,
        ("tokenizer", "download or save"),
    ),
    "damaged tokenizer": (
        lambda z, g: (damaged(z, g, lambda b: b[:100], "tokenizer.json"), []),
        3,
        ("tokenizer", "download or save"),
    ),
    "missing tensor": (
        lambda z, g: (z.changed(g, lambda d: d.pop("model.layers.1.mlp.up_proj.weight")), []),  # type: ignore[arg-type,return-value]
        3,
        ("model.layers.1.mlp.up_proj.weight",),
    ),
    "NaN in a weight": (
        lambda z, g: (z.changed(g, poisoned("layers.1.mlp.down_proj.weight", float("nan"))), []),
        5,
        ("model.layers.1.mlp.down_proj.weight", "NaN", "checkpoint"),
    ),
    "infinity in the embedding": (
        lambda z, g: (z.changed(g, poisoned("embed_tokens.weight", float("inf"))), []),
        5,
        ("model.embed_tokens.weight", "inf"),
    ),
}


def damaged(zoo: Zoo, given: Path, change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Path:
    path = given / "model"
    shutil.copytree(zoo.llama, path)
    write(path / name, change((path / name).read_bytes()))
    return path


@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.usefixtures("no_work")
def test_a_request_that_cannot_be_met(
    case: str, zoo: Zoo, given: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code, words = REQUESTS[case]
    model, more = make(zoo, given)
    command = ["quantize", str(model), "--out", str(place / "out"), *COMMON]
    capsys.readouterr()
    assert cli.run([*command, "--data", str(given / "text.txt"), *more]) == code
    one_line(capsys.readouterr(), *words)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("case", ["scheme", "method value", "group size", "rule that matches nothing", "shift"])
def test_plan_refuses_the_same(case: str, zoo: Zoo, given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, code, words = REQUESTS[case]
    model, more = make(zoo, given)
    assert cli.run(["plan", str(model), "--quiet", *more]) == code
    one_line(capsys.readouterr(), *words)


@pytest.mark.parametrize(
    "case",
    ["scheme", "method", "method value", "kv bits", "stock with kv bits", "range", "float rows, dynamic"],
)
def test_a_contradiction_is_known_before_the_model_is_read(
    case: str, zoo: Zoo, given: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was read")

    make, code, _ = REQUESTS[case]
    model, more = make(zoo, given)
    monkeypatch.setattr("model_zoo.sources.load_model", read)
    assert cli.run(["quantize", str(model), "--out", str(place / "out"), *more]) == code


DATA: dict[str, tuple[Callable[[Path], Path | str], tuple[str, ...]]] = {
    "missing": (lambda g: g / "none.txt", ("none.txt", "check the path")),
    "empty": (lambda g: write(g / "empty.txt", ""), ("empty.txt", "empty")),
    "blank": (lambda g: write(g / "blank.txt", "\n \n"), ("blank.txt", "empty")),
    "too short": (lambda g: write(g / "short.txt", "Hello."), ("short.txt", "6 tokens", "window of 32")),
    "binary": (lambda g: write(g / "weights.bin", bytes(range(256)) * 8), ("weights.bin", "binary")),
    "latin-1": (lambda g: write(g / "old.txt", "déjà vu ".encode("latin-1") * 99), ("old.txt", "UTF-8")),
    "folder without text": (lambda g: folder_with(g, image__png=b"\x89PNG"), ("folder", "holds no")),
    "no text column": (lambda g: write(g / "rows.jsonl", '{"id": 1}\n'), ("rows.jsonl", "row 1")),
    "not JSON": (lambda g: write(g / "rows.jsonl", "{nope\n"), ("rows.jsonl", "JSON")),
    "not parquet": (lambda g: write(g / "rows.parquet", b"PAR1 no"), ("rows.parquet", "parquet")),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.usefixtures("no_work")
def test_data_that_is_none(case: str, zoo: Zoo, given: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = DATA[case]
    data = str(make(given))
    assert cli.run(["quantize", str(zoo.llama), "--out", str(place / "out"), "--data", data, *COMMON]) == 4
    one_line(capsys.readouterr(), *words)
    assert list(place.iterdir()) == []


def test_fewer_rows_than_asked_are_a_warning_of_one_line(
    zoo: Zoo, given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write(given / "little.txt", TEXT))
    short = ["--samples", "40", "--seq-len", "16", "--method", "rtn", "--prefix", "none", "--no-verify"]
    command = ["quantize", str(zoo.llama), "--data", data, *short]
    assert cli.run([*command, "--out", str(given / "loud")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and "of 40 rows" in lines[0]
    assert cli.run([*command, "--out", str(given / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
ITEMS: dict[str, tuple[Any, str]] = {
    "no item": ([], "holds no text"),
    "a number": (3, "int"),
    "bytes": ([b"abc"], "neither text nor tokens"),
    "both kinds": (["text", {"input_ids": IDS}], "mixes"),
    "floats": ([{"input_ids": IDS.float()}], "float32"),
    "negative id": ([{"input_ids": IDS - 100}], "negative"),
    "an empty tensor": ([{"input_ids": IDS[:0]}], "input_ids are"),
    "a mask of zeros": ([{"input_ids": IDS, "attention_mask": IDS * 0}], "without a real token"),
    "a mask of another shape": ([{"input_ids": IDS, "attention_mask": IDS[:, 1:]}], "same shape"),
    "an id beyond the vocabulary": (
        [{"input_ids": IDS}, {"input_ids": IDS.where(IDS[2, 5] != IDS, 128)}],
        "token id 128, and the model's vocabulary has 128 entries",
    ),
    "a row beyond the model": (
        [{"input_ids": IDS.repeat(1, 5)}],
        "80 tokens, beyond the model's limit of 64",
    ),
}


@pytest.mark.parametrize("case", ITEMS)
@pytest.mark.usefixtures("no_work")
def test_token_dicts_that_do_not_fit(case: str) -> None:
    data, words = ITEMS[case]
    with pytest.raises(DataError) as caught:
        calib.quantize(build("llama"), "w8a8", "rtn", data, progress=False)
    assert words in str(caught.value) and caught.value.fix and "\n" not in str(caught.value)


class Plain(nn.Module):
    """Any module: what it is given after the embedding is the body."""

    def __init__(self, *body: nn.Module, chain: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 16)
        self.body = nn.ModuleList(body) if chain else nn.Sequential(*body)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for module in self.body:
            x = module(x)
        return x


def nan_weights() -> nn.Module:
    model = build("bert")
    model.get_parameter("bert.encoder.layer.1.output.dense.weight")[3, 4] = float("nan")
    return model


MODULES: dict[str, tuple[Callable[[], nn.Module], type[CalibError], str]] = {
    "no linears": (lambda: Plain(nn.LayerNorm(16)), ModelError, "no linear layers"),
    "no blocks": (lambda: Plain(nn.Linear(16, 16)), ModelError, "no chain of repeated layers"),
    "no parameters": (lambda: nn.Identity(), ModelError, "Identity"),
    "does not run": (
        lambda: Plain(nn.Linear(8, 8), chain=True),
        ModelError,
        "does not run on the calibration data",
    ),
    "NaN in a weight": (nan_weights, NumericsError, "bert.encoder.layer.1.output.dense.weight"),
}


@pytest.mark.parametrize("case", MODULES)
@pytest.mark.usefixtures("no_work")
def test_modules_that_cannot_be_quantized(case: str) -> None:
    make, kind, words = MODULES[case]
    with pytest.raises(kind) as caught:
        calib.quantize(make(), "w8a8", "rtn", batches("llama"), progress=False)
    assert words in str(caught.value) and caught.value.fix


@pytest.mark.usefixtures("no_work")
def test_a_module_that_no_checkpoint_can_hold_is_refused_before_work(place: Path) -> None:
    model = Plain(nn.Linear(16, 16), nn.Linear(16, 16), chain=True)
    with pytest.raises(OutputError, match="not a transformers model"):
        calib.quantize(model, "w8a8", "rtn", batches("llama"), place / "out", progress=False)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"input_granularity": "row"}, {"weight_range": "best"}, {"weight_bits": 9}, {"x": 1}]
)
@pytest.mark.usefixtures("no_work")
def test_scheme_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        calib.quantize(build("llama"), "w8a8", "rtn", batches("llama"), progress=False, scheme_options=options)


@pytest.mark.parametrize("options", [{"format": "gguf"}, {"float_rows": 1.5}, {"samples": 0}, {"hopes": 1}])
@pytest.mark.usefixtures("no_work")
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        calib.quantize(build("llama"), "w8a8-static", "rtn", batches("llama"), progress=False, **options)


def overflowing(tensors: dict[str, Tensor]) -> None:
    """Finite weights whose product is not."""
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"].fill_(1e25)


@pytest.mark.parametrize("method", ["rtn", "os+"])
def test_activations_that_are_not_finite_are_named(
    method: str, zoo: Zoo, given: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = zoo.changed(given, overflowing)
    command = [
        "quantize",
        str(model),
        "--out",
        str(place / "out"),
        "--data",
        str(given / "text.txt"),
        *COMMON,
    ]
    assert cli.run([*command, "--method", method]) == 5
    one_line(capsys.readouterr(), "activations at model.layers.1.mlp", "NaN or inf", "1 of 2 blocks are finished")
    assert [p.name for p in place.iterdir()] == [".out.partial"]  # the first block is good


def command_for(zoo: Zoo, given: Path, out: Path) -> list[str]:
    """A run that goes through."""
    quick = ["--method", "rtn", "--prefix", "none", *COMMON]
    return ["quantize", str(zoo.llama), "--data", str(given / "text.txt"), "--out", str(out), *quick]


def file_as_parent(place: Path) -> Path:
    return write(place / "file", "mine") / "out"


def other_folder(place: Path) -> Path:
    (place / "out").mkdir()
    write(place / "out" / "thesis.txt", "mine")
    return place / "out"


PLACES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "below a file": (file_as_parent, ("cannot write", "choose an --out")),
    "where nobody can write": (
        lambda p: Path("/proc/nobody/out"),
        ("cannot write /proc/nobody/out", "choose"),
    ),
    "a file": (lambda p: write(p / "out", "mine"), ("is a file", "--overwrite")),
    "another folder": (other_folder, ("did not write", "--overwrite")),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.usefixtures("no_work")
def test_a_place_that_cannot_take_the_output(
    case: str, zoo: Zoo, given: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = PLACES[case]
    out = make(place)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    assert cli.run(command_for(zoo, given, out)) == 6
    one_line(capsys.readouterr(), *words)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
@pytest.mark.usefixtures("no_work")
def test_a_read_only_place(
    number: int,
    zoo: Zoo,
    given: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    assert cli.run(command_for(zoo, given, place / "deep" / "out")) == 6
    one_line(capsys.readouterr(), "cannot write", os.strerror(number), "this user can write")
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("no_work")
def test_a_full_disk_is_known_before_work(
    zoo: Zoo, given: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    assert cli.run(command_for(zoo, given, place / "out")) == 6
    one_line(capsys.readouterr(), "1 MiB free", "free some space")
    assert list(place.iterdir()) == []


FULL: dict[str, tuple[str, Exception]] = {
    "weights": ("calib.engine.journal.save_file", OSError(errno.ENOSPC, "No space left on device")),
    "manifest": ("calib.export.checkpoint.write_json", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "tokenizer": (
        "transformers.PreTrainedTokenizerBase.save_pretrained",
        Exception("No space left on device (os error 28)"),  # what the tokenizers package raises
    ),
    "verification": ("calib.export.verify.save_file", OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_fills_up_while_writing(
    case: str,
    zoo: Zoo,
    given: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where, error = FULL[case]

    def full(*_: Any, **__: Any) -> None:
        raise error

    command = command_for(zoo, given, place / "out")  # makes the model, if no test before has
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        assert cli.run(command) == 6
    finished = case != "weights"
    hint = ["2 of 2 blocks are finished", "again to go on"] if finished else []
    one_line(capsys.readouterr(), "the disk is full", "free some space", *hint)
    assert [p.name for p in place.iterdir()] == ([".out.partial"] if finished else [])
    assert cli.run(command) == 0
    assert [p.name for p in place.iterdir()] == ["out"]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """The fresh process of a verification, replaced: it is off by ``difference`` of the logit range."""
    wanted = {"difference": 0.0}

    def fresh(folders: Sequence[Path], own: bool) -> dict[Path, tuple[dict[str, Tensor], str]]:
        found = {}
        for folder in folders:
            logits = load_file(folder / verify.REFERENCE)["logits"]
            logits = logits + wanted["difference"] * (logits.max() - logits.min())
            found[folder] = ({"logits": logits, "packed": logits, "kernels": torch.zeros(1)}, "a stand-in")
        return found

    monkeypatch.setattr(verify, "_fresh_answers", fresh)
    yield wanted


def test_what_fails_verification_is_not_left_as_finished(
    zoo: Zoo, given: Path, place: Path, answers: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["difference"] = 0.5
    assert cli.run(command_for(zoo, given, place / "out")) == 7
    one_line(capsys.readouterr(), str(place / "out"), "of the logit range", "so out was not written")
    assert list(place.iterdir()) == []
    answers["difference"] = 0.0
    assert cli.run(command_for(zoo, given, place / "out")) == 0
    manifest = json.loads((place / "out" / "calib.json").read_text())
    assert manifest["report"]["verify"]["max_difference"] == 0.0
    assert {"load", "data", "plan", "save", "verify", "total"} <= manifest["seconds"].keys()
    assert manifest["peak_rss_mib"] > 1 and manifest["sha256"] and manifest["recipe"] and manifest["data"]
    files = sorted((place / "out").glob("*.safetensors"))
    weights = [file.read_bytes() for file in files]
    answers["difference"] = 0.5
    capsys.readouterr()
    assert cli.run(command_for(zoo, given, place / "out")) == 7  # the earlier output stays
    assert files and [file.read_bytes() for file in files] == weights
    assert [p.name for p in place.iterdir()] == ["out"]


def test_verify_errors_keep_their_class(place: Path, answers: dict[str, float]) -> None:
    answers["difference"] = 0.5
    result = calib.quantize(build("llama"), "w8a8", "rtn", batches("llama"), progress=False)
    with pytest.raises(VerifyError):
        result.save(place / "out")
    assert result.out is None and list(place.iterdir()) == []


@pytest.mark.parametrize("format", ["calib", "compressed-tensors"])
@pytest.mark.usefixtures("answers")
def test_a_quantized_model_given_again(
    format: str, zoo: Zoo, given: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*command_for(zoo, given, given / "first"), "--format", format]) == 0
    capsys.readouterr()
    again = ["quantize", str(given / "first"), "--out", str(place / "out"), "--data", str(given / "text.txt")]
    assert cli.run([*again, *COMMON]) == 2
    one_line(capsys.readouterr(), "quantized already", format, "float model")
    assert list(place.iterdir()) == []


def test_a_quantized_module_given_again() -> None:
    result = calib.quantize(build("llama"), "w8a8", "rtn", batches("llama"), progress=False)
    with pytest.raises(InputError, match="quantized already"):
        calib.quantize(result.model, "w8a8", "rtn", batches("llama"), progress=False)


@pytest.mark.parametrize(
    "where", ["calib.engine.run.Engine._block", "calib.engine.journal.save_file", "calib.export.verify.store_reference"]
)
def test_interrupted_wherever_it_is(
    where: str,
    zoo: Zoo,
    given: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = command_for(zoo, given, place / "out")
    monkeypatch.setattr(where, interrupt)
    assert cli.run(command) == 130
    late = where.endswith("store_reference")
    one_line(capsys.readouterr(), "interrupted", "2 of 2 blocks are finished" if late else "nothing half-written")
    assert [p.name for p in place.iterdir()] == ([".out.partial"] if late else [])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_while_verifying(zoo: Zoo, given: Path, place: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-m", "calib.cli", *command_for(zoo, given, place / "out")]
    process = subprocess.Popen(
        command, cwd=place, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(place.glob(".out.partial/*/verify/reference.safetensors")):
        pass
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors.startswith("error: interrupted"), errors
    assert [p.name for p in place.iterdir()] == [".out.partial"]
