"""The notebooks: the committed ones are their scripts, executed; and they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.notebooks.make import cells, executed, scripts

SCRIPTS = {script.stem: script for script in scripts()}


def committed(script: Path) -> dict[str, Any]:
    found = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_committed_notebook_is_its_script_executed(name: str) -> None:
    file = SCRIPTS[name].with_suffix(".ipynb")
    if not file.is_file():
        pytest.skip(f"{file.name} is not made yet: python -m experiments.notebooks.make {name[0]}")
    book = committed(SCRIPTS[name])
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]] == cells(SCRIPTS[name])
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    outputs = [out for cell in code for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error"]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 1, "one picture at least"
    assert all(cell["execution_count"] for cell in code) and file.stat().st_size < 400_000


def test_there_are_six() -> None:
    assert [name[0] for name in SCRIPTS] == list("123456")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_notebook_runs(name: str, shared: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    for needed in ("models/minilm-l6-sst2", "models/stories260k", "data/sst2"):
        if not (shared / needed).is_dir():
            pytest.skip(f"../shared/{needed} is absent")
    book = executed(SCRIPTS[name])
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
