"""Notebooks from the scripts beside this file: cells begin at ``# %%``, text cells at ``# %% [markdown]``.

    python -m experiments.notebooks.make [NAME ...]     # run them, write NAME.ipynb with outputs

Needs the extra ``notebooks`` (nbformat, nbclient, ipykernel, matplotlib) and ../shared.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 300  # for one cell


def scripts() -> list[Path]:
    """The notebooks' scripts, in the order they are meant to be read in."""
    return sorted(HERE.glob("[0-9]_*.py"))


def cells(script: Path) -> list[tuple[str, str]]:
    """(kind, source) of each cell; text without its comment signs."""
    found = []
    for part in re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = (line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip()))
    return found


def notebook(script: Path) -> Any:
    """The script as a notebook without outputs; cell ids are their numbers, so that nothing changes by itself."""
    import nbformat

    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    book = nbformat.v4.new_notebook(
        cells=[make[kind](source, id=f"cell-{i}") for i, (kind, source) in enumerate(cells(script))]
    )
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


def executed(script: Path) -> Any:
    """The notebook, run from its own folder. Raises nbclient's CellExecutionError."""
    from nbclient import NotebookClient

    book = notebook(script)
    NotebookClient(book, timeout=SECONDS, resources={"metadata": {"path": str(HERE)}}, record_timing=False).execute()
    return cleaned(book)


def cleaned(book: Any) -> Any:
    """Without warnings and progress on stderr, and what differs from machine to machine."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.metadata.clear()
    book.metadata.pop("language_info", None)
    return book


def main() -> None:
    import nbformat

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of names; default: all")
    wanted = tuple(parser.parse_args().names)
    for script in scripts():
        if not wanted or script.name.startswith(wanted):
            nbformat.write(executed(script), script.with_suffix(".ipynb"))
            print(f"{script.stem}: done", flush=True)


if __name__ == "__main__":
    main()
