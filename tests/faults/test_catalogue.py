"""catalogue.txt: what the command line answers to each bad input, word by word, before any work.

``python -m tests.faults.test_catalogue`` prints the catalogue as it is now.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import calib
from calib import cli
from calib.engine import Engine, Journal
from calib.recipe import METHODS, SCHEMES
from tests.faults import box

CATALOGUE = Path(__file__).with_name("catalogue.txt")
SHORT = {"{schemes}": ", ".join(SCHEMES), "{methods}": ", ".join(METHODS)}


def entries() -> Iterator[tuple[str, str]]:
    """Commands and their answers: exit code and line."""
    command = ""
    for line in CATALOGUE.read_text(encoding="utf-8").splitlines():
        if line.startswith("$ "):
            command = line.removeprefix("$ calib ")
        elif line and not line.startswith("#"):
            yield command, line


ENTRIES = dict(entries())


class Killed(BaseException):
    pass


class Worked(BaseException):
    """What should have been refused began."""


@contextlib.contextmanager
def inside(folder: Path, tokenizer: Any) -> Iterator[Path]:
    """The box, filled, as the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        box.fill(folder, tokenizer)
        write = Journal.write

        def dying(self: Journal, *args: Any) -> None:
            write(self, *args)
            raise Killed

        with patch.context() as deadly, contextlib.suppress(Killed):
            deadly.setattr(Journal, "write", dying)
            cli.run([*box.RUN, *box.DRAW, "--out", "killed"])
        box.journals(folder, folder / ".killed.partial")
        yield folder


def answer(command: str) -> str:
    """Exit code and error line of a command, in words that hold on any machine."""

    def worked(*_: Any, **__: Any) -> None:
        raise Worked(command)

    words = shlex.split(command)
    if words[0] == "quantize" and "--help" not in words:  # what is not said is small
        small = zip(box.DRAW[::2], box.DRAW[1::2], strict=True)
        words += [word for name, value in small if name not in words for word in (name, value)]
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if not any(f"--out {name}" in command for name in box.JOURNALS):
            patch.setattr(Engine, "run", worked)
            patch.setattr(calib.auto, "tried", worked)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = cli.run(words)
    text = f"{code} " + " | ".join(line for line in errors.getvalue().splitlines() if line.startswith("error: "))
    text = text.replace(str(Path.cwd()), "{box}")
    for short, long in SHORT.items():
        text = text.replace(long, short)
    return text


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Iterator[Path]:
    with inside(tmp_path_factory.mktemp("box"), byte_tokenizer) as folder:
        yield folder


def test_there_are_enough() -> None:
    assert len(ENTRIES) >= 60 and all(line[0] in "234567" and "; " in line for line in ENTRIES.values())


def cases() -> list[Any]:
    """Some are run by default, from each part one in eight; all of them take a minute."""
    return [
        pytest.param(command, marks=() if number % 8 == 0 else pytest.mark.slow)
        for number, command in enumerate(ENTRIES)
    ]


@pytest.mark.parametrize("command", cases())
def test_the_answer_is_this_line(command: str, filled: Path) -> None:
    before = sorted(p.name for p in filled.iterdir())
    assert answer(command) == ENTRIES[command]
    assert sorted(p.name for p in filled.iterdir()) == before, "nothing is left"


def main() -> None:
    from tests.conftest import byte_tokenizer

    commands = ENTRIES if len(sys.argv) < 2 else Path(sys.argv[1]).read_text().splitlines()
    tokenizer = byte_tokenizer.__wrapped__() if hasattr(byte_tokenizer, "__wrapped__") else byte_tokenizer()
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder), tokenizer):
        for command in commands:
            print(f"$ calib {command}")
            try:
                print(answer(command), flush=True)
            except Exception as error:
                print(f"1 {type(error).__name__}: {error}", flush=True)
            except Worked:
                print("0 began to work", flush=True)


if __name__ == "__main__":
    main()
