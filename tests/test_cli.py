"""The command line: what it prints, its JSON, and one line with an exit code for all that goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import calib
from calib import cli, recipe
from tests.small import save_llama

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "tiny", byte_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 60)
    return file


def quantize(tiny: Path, out: Path, *more: str) -> int:
    options = ["--samples", "4", "--seq-len", "32", "--batch-size", "2", "--method", "rtn", "--out", str(out)]
    return cli.run(["quantize", str(tiny), *options, *more])


def last_json(output: str) -> dict[str, Any]:
    value = json.loads(output.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def one_line(captured: Any) -> str:
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return str(lines[0])


@pytest.mark.parametrize("command", ["", "quantize", "plan", "inspect", "eval", "verify", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    assert "Usage: calib" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) != 0
    assert "quantize" in capsys.readouterr().out


def test_the_main_job_end_to_end(tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert quantize(tiny, out, "--scheme", "w8a8", "--data", str(text), "--json", "--quiet") == 0
    result = last_json(capsys.readouterr().out)
    assert set(result) == {"out", "plan", "quality", "seconds", "peak_rss_mib"}
    assert result["quality"]["ratio"] == pytest.approx(1, abs=0.1)
    assert set(result["plan"]) == {"transformed", "quantized", "excluded"}
    assert result["plan"]["quantized"] == 14 and list(result["plan"]["excluded"]) == ["lm_head"]
    assert result["out"] == str(out) and result["seconds"]["total"] > 0 and result["peak_rss_mib"] > 0

    measure = ["--data", str(text), "--windows", "4", "--seq-len", "32", "--json", "--quiet"]
    assert cli.run(["eval", str(out), *measure, "--reference", str(tiny)]) == 0
    result = last_json(capsys.readouterr().out)
    assert {"task", "metric", "value", "ci95", "n", "seconds", "peak_rss_mib", "bootstrap95"} <= set(result)
    assert set(result["paired"]) == {"difference", "ci95", "p", "test"} and 0 < result["paired"]["p"] <= 1
    assert 0.8 < result["reference"]["ratio"] < 1.25 and result["n"] == 4
    assert cli.run(["eval", str(tiny), *measure]) == 0
    assert set(last_json(capsys.readouterr().out)) == {
        "task", "metric", "value", "ci95", "n", "seconds", "peak_rss_mib", "bootstrap95"
    }  # fmt: skip
    generation = ["--task", "generation", "--new-tokens", "4", *measure]
    assert cli.run(["eval", str(out), *generation, "--against", str(tiny)]) == 0
    result = last_json(capsys.readouterr().out)
    assert result["metric"] == "agreement" and 0 <= result["value"] <= result["forced_top1"] <= 1
    assert (out / "report.html").is_file() and json.loads((out / "report.json").read_text())["schema"] == 1

    assert cli.run(["verify", str(out), "--json"]) == 0
    assert last_json(capsys.readouterr().out)["max_difference"] <= 1e-3


OPTIONS: dict[str, dict[str, Any]] = {
    "": {"sites": None, "shift": "auto", "scale": True, "damp": 0.01, "format": "auto", "prefix": "auto"},
    "--sites auto": {"sites": None},
    "--sites exact": {"sites": ("norm", "vo", "updown", "fc")},
    "--sites all": {"sites": ("norm", "vo", "updown", "fc", "fused")},
    "--sites norm,fc": {"sites": ("norm", "fc")},
    "--shift on --scale off": {"shift": True, "scale": False},
    "--shift off --damp 0.1": {"shift": False, "damp": 0.1},
    "--prefix 1,2": {"prefix": (1, 2)},
    "--prefix none": {"prefix": "none"},
    "--search exhaustive --inputs float": {"search": "exhaustive", "inputs": "float"},
    "--objective output": {"objective": "output"},
    "--float-rows 0.01 --format calib": {"float_rows": 0.01, "format": "calib"},
    "--method os+,gptq --scheme w4a8": {"method": "os+,gptq", "scheme": "w4a8"},
}
SCHEME_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "--weights-group 64": {"weight_group": 64},
    "--weights-group 0": {"weight_group": 0},
    "--weights-symmetric": {"weight_symmetric": True},
    "--weights-asymmetric": {"weight_symmetric": False},
    "--acts-symmetric": {"input_symmetric": True},
    "--acts-asymmetric": {"input_symmetric": False},
    "--acts-granularity tensor": {"input_granularity": "tensor"},
    "--kv-bits 8": {"kv_bits": 8},
    "--attention-bits 6": {"attention_bits": 6},
    "--weights-range mse --acts-range percentile": {"weight_range": "mse", "input_range": "percentile"},
    "--exclude a --exclude b": {"exclude": ("a", "b")},
    "--override a=b=w8a8 --override c=w4a16": {"overrides": (("a=b", "w8a8"), ("c", "w4a16"))},
}


class Asked(Exception):
    """Carries what a command asked of calib."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **arguments: Any) -> None:
        raise Asked(arguments)

    monkeypatch.setattr(calib, "quantize", ask)
    monkeypatch.setattr(calib, "cost", ask)


def arguments_of(command: str, options: str) -> dict[str, Any]:
    out = ["--out", "out"] if command == "quantize" else []
    with pytest.raises(Asked) as caught:
        cli.run([command, "model", *out, *options.split()])
    arguments = caught.value.args[0]
    assert isinstance(arguments, dict)
    return arguments


@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.usefixtures("asked")
def test_options_reach_the_recipe(command: str) -> None:
    for options, wanted in OPTIONS.items():
        arguments = arguments_of(command, options)
        assert {key: arguments[key] for key in wanted} == wanted, options
    for options, wanted in SCHEME_OPTIONS.items():
        arguments = arguments_of(command, options)
        given = {k: v for k, v in arguments["scheme_options"].items() if v is not None}
        assert given == wanted, options
        scheme = recipe.scheme("w8a8-static", **arguments["scheme_options"])
        assert (scheme == recipe.SCHEMES["w8a8-static"]) == (options in NEUTRAL), options


NEUTRAL = ("", "--weights-group 0", "--weights-symmetric", "--acts-asymmetric", "--acts-granularity tensor")


def test_every_option_of_scheme_and_recipe_is_on_the_command_line() -> None:
    from calib.options import RecipeOptions

    arguments = RecipeOptions().arguments("model")
    own = {"samples", "seq_len", "batch_size", "seed"}  # of quantize alone
    assert set(recipe.Recipe.model_fields) - own - {"scheme", "methods"} <= arguments.keys()
    bits = {"weight_bits", "input_bits"}  # in the scheme's name
    documented = set(re.findall(r"``(\w+)``", recipe.scheme.__doc__ or ""))
    assert documented - bits == arguments["scheme_options"].keys()


def test_options_end_to_end(tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = "--scheme w4a8 --weights-group 16 --weights-asymmetric --acts-symmetric --kv-bits 8 --no-verify"
    assert quantize(tiny, out, "--data", str(text), *options.split()) == 0
    made = json.loads((out / "calib.json").read_text())["recipe"]["scheme"]
    assert made["weights"]["group_size"] == 16 and not made["weights"]["symmetric"]
    assert made["inputs"]["symmetric"] and made["kv"]["bits"] == 8
    assert calib.load(out, mode="fake")
    assert "written to" in capsys.readouterr().out


def test_plan_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["plan", str(tiny), "--json"]) == 0
    captured = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in captured
    assert last_json(captured)["quantized"] == 14
    assert list(tmp_path.iterdir()) == []


def test_plan_of_what_has_no_predicted_cost(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """low_rank reads the weights and says what becomes of them; a limit of memory it cannot promise."""
    words = ["plan", str(tiny), "--scheme", "none", "--method", "low_rank", "--keep", "0.5", "--data", str(text)]
    assert cli.run([*words, "--json"]) == 0
    captured = capsys.readouterr().out
    assert "14 factored, 0 quantized" in captured and "what low_rank costs is not predicted" in captured
    assert last_json(captured)["cost"] is None
    assert cli.run([*words, "--max-memory", "4GiB"]) == 2


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "--json"]) == 0
    facts = last_json(capsys.readouterr().out)
    assert facts["versions"]["calib"] == calib.__version__ and "smollm2-135m" in facts["models"]
    assert cli.run(["info"]) == 0
    assert "kernels:" in capsys.readouterr().out


FAILURES = {
    "unknown command": ("quantise x", 2, "quantise"),
    "unknown option": ("plan {tiny} --shceme w8a8", 2, "--shceme"),
    "no output": ("quantize {tiny}", 2, "--out"),
    "unknown scheme": ("quantize {tiny} --out {out} --scheme w9a9", 2, "w9a9"),
    "unknown method": ("quantize {tiny} --out {out} --method magic", 2, "magic"),
    "unknown model": ("quantize smolm2-135m --out {out}", 2, "smollm2-135m"),
    "no such folder": ("quantize ./nowhere/model --out {out}", 2, "nowhere"),
    "unknown format": ("quantize {tiny} --out {out} --format gguf2", 2, "gguf2"),
    "unknown dtype": ("quantize {tiny} --out {out} --dtype int3", 2, "int3"),
    "unknown sites": ("quantize {tiny} --out {out} --sites norm,nose", 2, "sites"),
    "unknown range": ("quantize {tiny} --out {out} --acts-range best", 2, "best"),
    "rule that matches nothing": (
        "quantize {tiny} --out {out} --exclude xyz --samples 2 --seq-len 16",
        2,
        "xyz",
    ),
    "rule that is no expression": ("quantize {tiny} --out {out} --exclude ( --samples 2", 2, "regular"),
    "missing data": ("quantize {tiny} --out {out} --data {out}/none.txt", 4, "none.txt"),
    "empty data": ("quantize {tiny} --out {out} --data {empty}", 4, "empty"),
    "output is the model": ("quantize {tiny} --out {tiny} --overwrite", 6, "holds the input"),
    "read-only output": ("quantize {tiny} --out /proc/nobody/out", 6, "cannot write"),
    "windows beyond the model": ("quantize {tiny} --out {out} --seq-len 512", 2, "128"),
    "eval without data": ("eval {tiny} --data nowhere.txt", 4, "nowhere.txt"),
    "unknown task": ("eval {tiny} --data {empty} --task chess", 2, "chess"),
    "generation of one": ("eval {tiny} --data {empty} --task generation", 2, "--against"),
    "scheme file": ("quantize {tiny} --out {out} --scheme {out}/no.json", 2, "cannot be read"),
    "verify nothing": ("verify {out}", 3, "no folder"),
    "verify a float model": ("verify {tiny}", 3, "verified once"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line(case: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, code, word = FAILURES[case]
    (tmp_path / "empty.txt").write_text("")
    names = {"tiny": str(tiny), "out": str(tmp_path / "out"), "empty": str(tmp_path / "empty.txt")}
    assert cli.run([part.format(**names) for part in command.split()]) == code
    assert word in one_line(capsys.readouterr())
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tiny, tmp_path / "out", "--data", str(text), "--no-verify", "--format", "calib") == 0
    assert quantize(tmp_path / "out", tmp_path / "again", "--data", str(text)) == 2
    assert "quantized already" in one_line(capsys.readouterr())


def test_interrupted(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calib, "cost", interrupt)
    assert cli.run(["plan", str(tiny)]) == 130
    assert "interrupted" in one_line(capsys.readouterr())


def test_a_bug_is_not_hidden(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(calib, "cost", bug)
    with pytest.raises(ZeroDivisionError):
        cli.run(["plan", str(tiny)])


def test_importing_calib_imports_no_optional_backend() -> None:
    optional = "matplotlib, lm_eval, onnx, onnxruntime, torchao, gptqmodel"
    code = f"import calib, sys; print([n for n in {optional.split(', ')} if n in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_a_real_process_leaves_no_output(tiny: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "calib.cli",
        "quantize",
        str(tiny),
        "--method",
        "os+",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = ""
    while "calibrating" not in errors and (character := process.stderr.read(1)):
        errors += character
    process.send_signal(signal.SIGINT)
    errors += process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert re.search(r"^error: interrupted", errors, re.MULTILINE) and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
