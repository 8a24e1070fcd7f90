"""Files from strangers: nothing is allocated on their word, nothing outside the folder is read, nothing is executed."""

from __future__ import annotations

import ast
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import calib
from calib.engine import Journal
from calib.errors import CalibError, ModelError, OutputError
from calib.export import verify
from calib.export.files import MANIFEST, read_manifest
from calib.export.load import check_folder, read_config
from calib.files import is_file_name
from calib.model import TensorFiles
from calib.model.skeleton import read_config as model_config
from calib.model.store import shards
from calib.options import _scheme
from calib.recipe import SCHEMES
from model_zoo.sources import load_model
from tests.families import build
from tests.faults.box import DOWN, HUGE, INDEX, WEIGHTS, entry, packed_header
from tests.faults.draw import JSON, changed, damaged, faults

ROOT = Path(calib.__file__).parents[1]
SMALL = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int8)}, {"format": "pt"})
HEADERS: dict[str, bytes] = {
    "10 TB": packed_header({DOWN: entry("F32", [HUGE // 4], [0, HUGE])}),
    "10 TB in no bytes": packed_header({DOWN: entry("F32", [HUGE // 4], [0, 4])}, b"1234"),
    "2^80 elements": packed_header({DOWN: entry("F32", [2**40, 2**40], [0, 4])}, b"1234"),
    "negative": packed_header({DOWN: entry("F32", [-1], [0, 4])}, b"1234"),
    "backwards": packed_header({DOWN: entry("F32", [1], [4, 0])}, b"1234"),
    "beyond": packed_header({DOWN: entry("F32", [1], [4, 8])}, b"1234"),
    "twice the same bytes": packed_header({"a": entry(), "b": entry()}, b"1234"),
    "a word for a shape": packed_header({DOWN: {**entry(), "shape": "big"}}, b"1234"),
    "no dtype": packed_header({DOWN: {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "a list": packed_header([], b"1234"),
    "a long header": (1 << 40).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("header", HEADERS)
def test_what_a_header_claims_is_not_allocated(header: str, tmp_path: Path) -> None:
    file = tmp_path / WEIGHTS
    file.write_bytes(HEADERS[header])
    (tmp_path / "config.json").write_text("{}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: TensorFiles([file]), lambda: check_folder(tmp_path)):
        with pytest.raises(ModelError, match="not safetensors") as caught:
            read()
        assert str(file) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


NAMES = ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 7, None, ["x"]]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_stays_in_its_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for place in ("x.safetensors", "model/x.safetensors", "model/x.bin"):
        (tmp_path / place).write_bytes(SMALL)
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"is damaged|no safetensors file beside it"):
        shards(tmp_path / "model")
    with pytest.raises(ModelError):
        TensorFiles.of(tmp_path / "model")


def test_a_journal_and_a_manifest_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    journal = Journal(tmp_path / ".out.partial", {})
    with pytest.raises(OutputError, match="which is not of it"):
        journal._check({"file": "../secret", "sha256": "0"})
    with pytest.raises(OutputError, match="which is not of it"):
        journal._check({"file": str(tmp_path / "secret"), "sha256": "0"})
    (tmp_path / MANIFEST).write_text('{"sha256": {"../secret": "0"}}')
    with pytest.raises(ModelError, match="names no files of its folder"):
        verify._check_hashes(tmp_path)
    assert is_file_name("model.safetensors") and not is_file_name("a\\b") and not is_file_name("a\0")


def only_known(read: Callable[[], Any]) -> None:
    """It works, or says in one line why not."""
    try:
        read()
    except CalibError as error:
        assert error.cause and error.fix and "\n" not in str(error)


@faults
@given(damaged(SMALL))
def test_damaged_weights(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / WEIGHTS
        file.write_bytes(data)

        def read() -> None:
            files = TensorFiles.of(Path(folder))
            assert sum(t.nbytes for _, t in files.read(list(files.where))) <= len(data)

        only_known(read)


@faults
@given(JSON | changed({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
def test_any_index(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.safetensors").write_bytes(SMALL)
        (Path(folder) / INDEX).write_text(json.dumps(value))
        only_known(lambda: [p.relative_to(folder) for p in shards(Path(folder))])


GROUP = {
    "weights": {"bits": 8, "symmetric": True, "granularity": "channel", "group_size": None, "range": "minmax"},
    "input": None, "shift": False, "rescale": False, "hadamard": 1, "float_rows": False, "bias": False,
    "targets": ["lm_head"],
}  # fmt: skip
CONFIG = {"quant_method": "calib", "format_version": 1, "groups": [GROUP], "rewrites": [], "biased_linears": []}


@faults
@given(JSON | changed({"model_type": "llama", "quantization_config": CONFIG}))
def test_any_config(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(value))
        only_known(lambda: read_config(Path(folder)))


@faults
@given(changed({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "rope_scaling": None}))
def test_any_model_config(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(value))
        only_known(lambda: model_config(folder))


@faults
@given(JSON | changed({"sha256": {WEIGHTS: "0"}, "format": "calib"}), st.text(max_size=20))
def test_any_manifest(value: Any, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for content in (json.dumps(value), text):
            (Path(folder) / MANIFEST).write_text(content)
            only_known(lambda: read_manifest(Path(folder)))
            only_known(lambda: verify._check_hashes(Path(folder)))
            only_known(lambda: verify._format(Path(folder)))


RECORD = {
    "block": "model.layers.0",
    "shard": {"file": "model/a.safetensors", "sha256": "0"},
    "carried": None,
    "structure": {"linears": {}, "attention": {}},
}


@faults
@given(st.lists(JSON | changed(RECORD), max_size=3), st.binary(max_size=20), JSON | changed({"model": {"a": "b"}}))
def test_any_journal(records: list[Any], tail: bytes, head: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / ".out.partial"
        (place / "model").mkdir(parents=True)
        lines = [json.dumps(each).encode() for each in (head, *records)]
        (place / "journal.jsonl").write_bytes(b"\n".join([*lines, tail]))
        only_known(lambda: Journal(place, {"model": {"a": "b"}}).close(remove=False))


@faults
@given(JSON | changed(json.loads(SCHEMES["w4a8-static"].model_dump_json())))
def test_any_scheme(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scheme.json"
        file.write_text(json.dumps(value))
        only_known(lambda: _scheme(str(file)))


FORBIDDEN = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}


@pytest.mark.parametrize("package", ["calib", "model_zoo"])
def test_nothing_in_the_package_executes_what_it_reads(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
                assert not {name.partition(".")[0] for name in names} & FORBIDDEN, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "torch.load", "os.system"), where
                for keyword in node.keywords:
                    given_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                    assert not (keyword.arg in ("trust_remote_code", "shell", "allow_pickle") and given_true), where


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    """Asked for by config.json, not by the user."""
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / WEIGHTS).write_bytes(SMALL)
    (tmp_path / "own.py").write_text("import sys; sys.modules['calib_was_had'] = sys")
    with pytest.raises(ModelError, match="code of its own"):
        calib.quantize(tmp_path, "w8a8", "rtn", progress=False)
    with pytest.raises(CalibError):
        calib.load(tmp_path)
    assert "calib_was_had" not in sys.modules


@pytest.mark.parametrize(
    ("claim", "said"), [({"num_hidden_layers": 10**9}, "layers"), ({"vocab_size": 10**12}, "weights, and its files")]
)
def test_what_a_config_claims_is_not_built(claim: dict[str, int], said: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **claim}))
    with pytest.raises(ModelError, match=f"claims .*{said}"):
        load_model(tmp_path, progress=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
def test_damaged_gguf_and_onnx_files_end() -> None:
    """In a process of its own, which forks for every file."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.foreign", "--draws", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r"^\w+", done.stdout, re.M)) == {"gguf", "onnx"} and "hung" not in done.stdout
