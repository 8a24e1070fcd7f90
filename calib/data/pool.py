"""A pool of text of any size as pieces of about one window each, read as they are asked for, again and again."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from calib.data.hub import hub_rows
from calib.data.read import (
    SUFFIXES,
    Chat,
    PathLike,
    Skipped,
    bad,
    files_below,
    is_pairs,
    is_path,
    read_pairs,
    row_text,
    rows,
    text_lines,
)
from calib.errors import DataError

Source = PathLike | Iterable[Any]
_LINE_PART = 1 << 20  # bytes of a text file's line that are held at once
_LABELS = 64  # kinds that are told apart; the others share the last
_LONGEST_NAME = 255
_LOOKED_AT = 16  # items of a list, to see whether they name files


class Hub(NamedTuple):
    """A dataset by its id on the hub."""

    id: str


class Piece(NamedTuple):
    """At most a window of one document. `label`: the source it came from, and its row's ``label`` if it has one."""

    text: str
    label: str


class Pool:
    """Pieces of at most `size` characters of one or several sources: files, folders, hub ids, or rows and strings.

    A text file is cut at line ends, a row's text into equal parts at white space; texts shorter than `size` stay
    pieces of their own. Bad lines and rows are counted in `skipped`, by reason, and characters in `labels`, both of the
    last pass.
    """

    def __init__(self, source: Source, size: int, *, column: str | None = None, chat: Chat | None = None) -> None:
        self.size, self.column, self.chat = size, column, chat
        self.sources = tuple(_sources(source))
        self.skipped: Skipped = Counter()
        self.labels: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        """Of the files; 0 where the size is not known."""
        return sum(source.stat().st_size for source in self.sources if isinstance(source, Path))

    def pieces(self) -> Iterator[Piece]:
        """Every piece, in a fixed order."""
        self.skipped, self.labels = Counter(), Counter()
        for source in self.sources:
            for text, label in self._texts(source):
                if not text.isascii():  # a lone surrogate, which JSON can hold, is no text to a tokenizer
                    text = text.encode("utf-8", "replace").decode()
                for part in cut(text, self.size):
                    if part := part.strip():
                        known = label in self.labels or len(self.labels) < _LABELS
                        name = label if known else "others"
                        self.labels[name] += len(part)
                        yield Piece(part, name)

    def _texts(self, source: Path | Hub | Iterable[Any]) -> Iterator[tuple[str, str]]:
        if isinstance(source, Hub):
            yield from self._row_texts(hub_rows(source.id), source.id)
        elif not isinstance(source, Path):
            yield from self._row_texts(source, "given data")
        elif is_pairs(source):
            for pair in zip(*read_pairs(source)[:2], strict=True):
                yield from ((text, source.name) for text in pair)
        elif source.suffix == ".txt" or source.suffix not in SUFFIXES:
            yield from ((text, source.name) for text in self._stretches(source))
        else:
            yield from self._row_texts(rows(source, self.column, self.skipped), source.name)

    def _row_texts(self, items: Iterable[Any], name: str) -> Iterator[tuple[str, str]]:
        for number, item in enumerate(items, start=1):
            row = {self.column or "text": item} if isinstance(item, str) else item
            try:
                if not isinstance(row, Mapping):
                    raise DataError(f"{name} row {number} is no text", "give strings or rows with a text column")
                text = row_text(row, f"{name} row {number}", self.column, self.chat)
            except DataError as error:
                bad(self.skipped, "rows without text", error)
                continue
            yield text, name if row.get("label") is None else f"{name}: {row['label']}"

    def _stretches(self, file: Path) -> Iterator[str]:
        """As many lines of a text file as a piece holds; a longer line alone."""
        held = ""
        for line in text_lines(file, self.skipped, _LINE_PART, whole=False):
            if held and len(held) + len(line) > self.size:
                yield held
                held = ""
            held += line
        yield held


def cut(text: str, size: int) -> Iterator[str]:
    """Equal parts of `text` of at most `size` characters, each ending after white space where some is near."""
    count = 1 if len(text) <= size else -(-5 * len(text) // (4 * size))  # room to move an end back by a fifth
    start = 0
    for index in range(1, count + 1):
        end = len(text) * index // count
        if index < count and (near := max(text.rfind(space, end - size // 5, end) for space in " \n")) >= start:
            end = near + 1
        yield text[start:end]
        start = end


def named(name: PathLike) -> Path | Hub:
    """What a name means: a file or folder, or else a hub id."""
    return Path(name).expanduser() if isinstance(name, os.PathLike) or is_path(name) else Hub(name)


def _sources(given: Source) -> Iterator[Path | Hub | Iterable[Any]]:
    """Files (those below a folder one by one), hub ids, and iterables of rows or strings."""
    if isinstance(given, (str, os.PathLike)):
        given = [named(given)]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        fix = "give a file, a folder, a hub id, or an iterable of strings or rows"
        raise DataError(f"cannot select from a {type(given).__name__}", fix)
    if isinstance(given, Iterator):
        raise DataError("a pool is read more than once, and an iterator gives its rows once", "give a list or a file")
    first = list(itertools.islice(given, _LOOKED_AT))
    if not any(map(_is_source, first)):
        yield given
        return
    for item in given:
        path = item if isinstance(item, Hub) else Path(item).expanduser()
        if isinstance(path, Path) and not path.exists():
            raise DataError(f"there is no file {path}", "check the path")
        yield from files_below(path) if isinstance(path, Path) and path.is_dir() else [path]


def _is_source(item: Any) -> bool:
    """A path or hub id, or a string that names what exists; any other string is text."""
    if isinstance(item, str) and 0 < len(item) < _LONGEST_NAME and "\n" not in item:
        return Path(item).expanduser().exists()
    return isinstance(item, (os.PathLike, Hub))
