"""What README.md tells people to type: every calib command in it parses, and the two marked commands exist."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import calib
from calib import auto, cli, recipe
from calib.options import RecipeOptions

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACEHOLDER = re.compile(r"[<\[{]|\.\.\.")  # of a synopsis, not of a command


def blocks(text: str, language: str = "sh") -> list[str]:
    """Contents of the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def invocations(block: str) -> list[list[str]]:
    """The arguments of each calib command of a shell snippet, whichever environment it is called from."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                while command and "=" in command[0]:  # variables set for it
                    del command[0]
                if command and Path(command[0]).name == "calib":
                    found.append(command[1:])
                command = []
            else:
                command.append(word)
    return found


COMMANDS = [arguments for block in blocks(README) for arguments in invocations(block)]


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters, as the command line's own parser reads them; nothing is run."""
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("calib", list(arguments))
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    inner = command.make_context(name, rest, parent=context)
    while hasattr(command, "commands"):  # calib data select
        last, command, rest = command.resolve_command(inner, [*inner._protected_args, *inner.args])
        name, inner = f"{name} {last}", command.make_context(last, rest, parent=inner)
    return name, inner.params


def test_commands_are_found_in_shell_snippets() -> None:
    snippet = "pip install calib && .venv/bin/calib info\n$ HF_HOME=x calib eval m --data 'a b' # --not-read\n"
    assert invocations(snippet) == [["info"], ["eval", "m", "--data", "a b"]]
    assert invocations("calib plan \\\n  model --json | tail -1\necho calib\n") == [["plan", "model", "--json"]]
    assert blocks("```sh\na\n```\n```python\nb\n```\n```sh\nc\n```\n") == ["a\n", "c\n"]


def test_wrong_commands_would_be_noticed() -> None:
    assert parsed(["plan", "model", "--sites", "norm"])[1]["sites"] == "norm"
    for wrong in (
        ["quantise", "model"],
        ["plan"],
        ["data", "select", "--pol", "a"],
        ["plan", "model", "--shceme", "w8a8"],
        ["quantize", "model"],
    ):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parsed(wrong)


def test_readme_has_commands() -> None:
    assert any(arguments[0] == "quantize" for arguments in COMMANDS)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_readme_command_parses(arguments: list[str]) -> None:
    assert not any(PLACEHOLDER.search(word) for word in arguments), "a command, not a synopsis"
    if "--help" in arguments:
        assert cli.run(arguments) == 0
        return
    name, given = parsed(arguments)
    if name in ("quantize", "plan"):  # the words are known too, not only the options
        names = RecipeOptions.__dataclass_fields__.keys() & given.keys()
        if given["scheme"].endswith(".json"):  # another of the commands writes it
            assert any(command[-2:] == ["--scheme-out", given["scheme"]] for command in COMMANDS)
            given["scheme"] = "w4a16"
        chosen = RecipeOptions(**{key: given[key] for key in names}).arguments(given["model"])
        scheme = recipe.scheme(chosen.pop("scheme"), **chosen.pop("scheme_options"))
        stock = chosen.pop("format") == "compressed-tensors"
        method = chosen.pop("method")
        method = auto.candidates(scheme, stock)[0].method if method == "auto" else method
        recipe.recipe(scheme, method, stock, **chosen)


def test_options_named_in_the_text_exist() -> None:
    group: Any = typer.main.get_command(cli.app)
    commands = [inner for c in group.commands.values() for inner in (c, *getattr(c, "commands", {}).values())]
    known = {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    named = {word for span in re.findall(r"`(--[^`]+)`", prose) for word in span.split() if word.startswith("--")}
    assert named <= known


@pytest.mark.parametrize("mark", ["main", "test"])
def test_marked_command(mark: str) -> None:
    after = README.split(f"<!-- command: {mark} -->")
    assert len(after) == 2, f"one block marked {mark}"
    assert after[1].lstrip("\n").startswith("```sh\n"), "the marked block follows its mark"
    block = blocks(after[1])[0]
    if mark == "main":
        assert any(arguments[0] == "quantize" for arguments in invocations(block))
    else:
        assert "pytest" in block


@pytest.mark.slow
def test_the_packed_model_answers_as_written(byte_tokenizer: Any, tmp_path: Path) -> None:
    """The snippet that talks to the main command's output, on a small model in its place."""
    after = README.split("<!-- command: chat -->")
    assert len(after) == 2 and after[1].lstrip("\n").startswith("```python\n")
    chatty = copy.deepcopy(byte_tokenizer)  # the session's other tests have no template
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(chatty), max_position_embeddings=256, **sizes))
    calib.quantize(
        model, "w8a8-static", "os+", out=tmp_path / "out/smollm2-w8a8", tokenizer=chatty, samples=4, seq_len=32,
        progress=False, verified=False, report=False,
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = blocks(after[1], "python")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n")
