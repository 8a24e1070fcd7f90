"""Every command of the command line: help with an example that parses, its JSON, its exit codes, one failure each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import calib
from calib import cli, errors
from model_zoo import entry as zoo
from tests.small import small_entry, small_model
from tests.test_readme import parsed


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


GROUP: Any = typer.main.get_command(cli.app)
COMMANDS = dict(commands(GROUP))

SUCCESS: dict[str, tuple[str, set[str]]] = {  # arguments, keys of the JSON object; in this order, each uses what lies
    "quantize": (
        "{model} --data {train.txt} --samples 4 --seq-len 32 --scheme w8a8 --method rtn --format calib --out {tmp}/q",
        {"out", "plan", "quality", "seconds", "peak_rss_mib"},
    ),
    "plan": (
        "{model}",
        {"transformed", "quantized", "factored", "excluded", "notes", "cost"},
    ),
    "inspect": (
        "{model} --data {train.txt} --samples 2 --seq-len 32",
        {"schema", "kind", "created", "command", "model", "data", "seconds", "versions", "machine", "seed", "blocks",
         "sites", "pictures", "sensitivity", "plan"},
    ),
    "eval": (
        "{tmp}/q --data {test.txt} --windows 3 --seq-len 32",
        {"task", "metric", "value", "ci95", "n", "seconds", "peak_rss_mib", "bootstrap95"},
    ),
    "verify": ("{tmp}/q", {"max_difference", "tolerance"}),
    "export": ("{tmp}/q --format float --weights-only --no-verify --out {tmp}/f", {"out", "format", "verify"}),
    "tune": (
        "{tmp}/q --data {train.txt} --loss ce --steps 2 --samples 4 --seq-len 32 --no-verify --out {tmp}/t",
        {"out", "loss", "trained", "seconds", "peak_rss_mib"},
    ),
    "rotate": (
        "{model} --no-verify --out {tmp}/r",
        {"out", "width", "norms", "writers", "readers", "heads", "difference", "learned", "verify", "peak_rss_mib"},
    ),
    "info": (
        "",
        {"versions", "machine", "devices", "kernels", "cache", "models", "zoo", "schemes", "methods"},
    ),
    "data select": (
        "--pool {train.txt} --target {test.txt} --windows 2 --seq-len 32 --out {tmp}/chosen.jsonl",
        {"out", "seconds"},
    ),
    "zoo list": ("", {"entries"}),
    "zoo pull": ("mine", {"name", "path", "source", "licence"}),
    "zoo build": (
        "mine --out {tmp}/z",
        {"schema", "name", "recipe", "created", "changed", "calibration", "format", "prefix", "bits", "size", "seconds",
         "speed", "peak_rss_mib", "plan", "verify", "versions", "machine", "load", "sha256", "test", "float", "rtn",
         "built", "reproduced", "out"},
    ),
    "zoo card": ("mine --from {tmp}/z --out {tmp}/card", {"name", "status", "figures", "written"}),
    "zoo export": (
        "mine --from {tmp}/z --format float --weights-only --out {tmp}/zf",
        {"name", "out", "format", "verify"},
    ),
}  # fmt: skip
SOME = {"verify", "data select"}  # give these keys and, by what was found, others

FAILURE: dict[str, tuple[str, int, str]] = {
    "quantize": ("{model} --out {tmp}/x --scheme w9a9", 2, "w9a9"),
    "plan": ("{tmp}/none/model", 2, "none"),
    "inspect": ("{model} --data {tmp}/none.txt", 4, "none.txt"),
    "eval": ("{model} --data {tmp}/none.txt", 4, "none.txt"),
    "verify": ("{tmp}/none", 3, "no folder"),
    "export": ("{model} --format zip --out {tmp}/x", 2, "zip"),
    "tune": ("{model} --loss magic --out {tmp}/x", 2, "magic"),
    "rotate": ("{model} --out {tmp}/x --dtype int8", 2, "int8"),
    "info": ("--threads 0", 2, "threads"),
    "data select": ("--pool {tmp}/none.txt --target {test.txt} --out {tmp}/x.jsonl", 4, "none.txt"),
    "zoo list": ("--long", 2, "--long"),
    "zoo pull": ("yours", 2, "yours"),
    "zoo build": ("yours --out {tmp}/x", 2, "yours"),
    "zoo card": ("mine --out {tmp}/x", 2, "--from"),
    "zoo export": ("mine --format zip --out {tmp}/x", 2, "zip"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Iterator[dict[str, str]]:
    """A model, text, a folder to write to, and a zoo of one entry."""
    folder = tmp_path_factory.mktemp("place")
    small = small_model(folder, byte_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("ENTRIES", "CARDS"):
            (folder / kind).mkdir()
            patch.setattr(zoo, kind, folder / kind)
        small_entry(folder / "ENTRIES" / "mine.yaml", small)
        yield {**small, "tmp": str(folder)}


def arguments(command: str, line: str, place: dict[str, str]) -> list[str]:
    for name, value in place.items():
        line = line.replace(f"{{{name}}}", value)
    return [*command.split(), *line.split()]


def test_every_command_is_in_the_tables() -> None:
    assert COMMANDS.keys() == SUCCESS.keys() == FAILURE.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_with_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: calib {command}" in shown and "--json" in shown and "--quiet" in shown
    example = COMMANDS[command].help.split("Example: calib ")[1].splitlines()[0]
    assert parsed(shlex.split(example))[0] == command
    assert all(p.help for p in COMMANDS[command].params if p.name != "help"), "every option says what it is"


@pytest.mark.parametrize("command", SUCCESS)
def test_json_is_the_last_line_and_all_there_is_when_quiet(
    command: str, place: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line, keys = SUCCESS[command]
    assert cli.run([*arguments(command, line, place), "--json", "--quiet"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    found = json.loads(out[0])
    assert found.keys() >= keys and (command in SOME or found.keys() == keys)


@pytest.mark.parametrize("command", FAILURE)
def test_a_failure_is_one_line_and_its_code(
    command: str, place: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line, code, word = FAILURE[command]
    assert cli.run(arguments(command, line, place)) == code
    printed = capsys.readouterr()
    lines = [each for each in printed.err.splitlines() if not each.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0] and not printed.out
    assert not (Path(place["tmp"]) / "x").exists()


def test_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in (*errors.__all__[1:], "Interrupted"):
        assert f"{getattr(errors, name).exit_code} " in shown.split("Exit codes:")[1], name


def test_interrupted_tuning_says_how_to_go_on(
    place: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calib, "tune", interrupt)
    assert cli.run(["tune", place["tmp"], "--out", "x"]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_CALIB_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as stop:
        cli.run([])
    assert stop.value.code == 0 and "_CALIB_COMPLETE" in capsys.readouterr().out
