"""What the documentation shows: its method runs, its commands parse, its messages exist, the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import calib
from calib import errors, recipe
from calib.engine import run as engine
from calib.methods import SiteMethod
from tests.families import batches, build, logits
from tests.test_readme import blocks, invocations, parsed

ROOT = Path(__file__).resolve().parents[1]
DOCS = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md")}
COMMANDS = [(page, words) for page, text in DOCS.items() for block in blocks(text) for words in invocations(block)]


def balance() -> SiteMethod:
    """The method that docs/methods.md writes."""
    code = blocks(DOCS["methods"], "python")[0]
    assert len(code.splitlines()) <= 45
    names: dict[str, Any] = {"__name__": "balance"}
    exec(compile(code, "docs/methods.md", "exec"), names)
    made: SiteMethod = names["Balance"]("0.5")
    return made


def test_the_worked_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    method, data = balance(), batches("llama")
    monkeypatch.setattr(engine, "resolve", lambda recipe: ([method], None))
    options: dict[str, Any] = {"prefix": "none", "progress": False, "report": False}
    result = calib.quantize(build("llama"), "w8a8-static", "os+", data, **options)
    sites = [site for site in result.report["sites"].values() if "identity_loss" in site]
    assert len(sites) >= 4 and all(site["loss"] <= site["identity_loss"] for site in sites)
    assert any(site["loss"] < site["identity_loss"] for site in sites)
    wanted, found = logits(build("llama"), data[0]), logits(result.model, data[0])
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    with pytest.raises(errors.InputError, match="power"):
        type(method)("2")  # type: ignore[call-arg]


def test_the_worked_examples_scale_is_one_where_nothing_stands_out() -> None:
    names: dict[str, Any] = {"__name__": "balance"}
    exec(compile(blocks(DOCS["methods"], "python")[0], "docs/methods.md", "exec"), names)
    assert torch.equal(names["balanced"](torch.ones(8), 0.5), torch.ones(8))


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_command_parses(page: str, words: list[str]) -> None:
    assert parsed(words)[0]


def test_every_scheme_and_method_is_in_the_tables() -> None:
    for name in recipe.SCHEMES:
        assert f"`{name}`" in DOCS["schemes"], name
    for name in recipe.METHODS:
        assert re.search(rf"`{re.escape(name)}[`\[]", DOCS["schemes"]), name


def test_the_messages_in_troubleshooting_are_given_somewhere() -> None:
    source = "\n".join(
        file.read_text(encoding="utf-8") for room in ("calib", "model_zoo") for file in (ROOT / room).rglob("*.py")
    )
    table = DOCS["troubleshooting"].split("## It says error")[1].split("## It is slow")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(quoted) >= 8
    for message in quoted:
        assert message in source, message


def test_exit_codes_are_in_the_table() -> None:
    for name in (*errors.__all__[1:], "Interrupted"):
        assert f"| {getattr(errors, name).exit_code} |" in DOCS["cli"], name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "shift" in (tmp_path / "site" / "os_plus" / "index.html").read_text(encoding="utf-8")
    assert "fonts.g" not in (tmp_path / "site" / "index.html").read_text(encoding="utf-8"), "nothing is fetched"
