"""Files to text: documents for calibration, labelled sentences and sentence pairs for evaluation.

Rows are read one at a time. What cannot be read is a DataError that names the file; where a counter `skipped` is
given, as for pools, one bad line is counted under its reason and the rest is read.
"""

from __future__ import annotations

import csv
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.errors import DataError
from calib.files import is_special

SUFFIXES = (".txt", ".jsonl", ".json", ".tsv", ".csv", ".parquet")
TEXT_COLUMNS = ("text", "sentence", "content", "document", "question", "prompt")
CHAT_COLUMNS = ("messages", "conversations")  # before the others: chat data often repeat their first prompt as text
LONGEST_LINE = 64 << 20  # bytes of one row; what is longer is no row
_STS_COLUMNS = 7  # genre, file, year, score, two sentences, and in STS-B's index also a number

PathLike = str | os.PathLike[str]
Chat = Callable[[list[Any]], str]
Skipped = Counter[str]


def read_text(path: PathLike) -> str:
    """The whole of a UTF-8 text file. Raises DataError when it is missing, unreadable, empty or binary."""
    file = Path(path)
    if not file.exists():
        raise DataError(f"there is no file {file}", "check the path")
    if file.is_dir():
        raise DataError(f"{file} is a folder", "name a file in it")
    check_kind(file)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", "check its permissions") from error
    if b"\0" in raw:
        raise DataError(f"{file} is binary ({len(raw)} bytes)", f"give text: {', '.join(SUFFIXES)}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start})", "convert it to UTF-8 text") from error
    if not text.strip():
        raise DataError(f"{file} is empty", "give a file with text")
    return text


def check_kind(file: Path) -> None:
    """Refuse what may never end; data are read more than once, too. Raises DataError."""
    if is_special(file):
        raise DataError(f"{file} is a pipe or a device, not a file", "write its text to a file")


def read_documents(
    path: PathLike, column: str | None = None, *, lines: bool = False, chat: Chat | None = None
) -> list[str]:
    """The texts in a file, or in every known file below a folder in sorted order.

    ``.txt`` is one document, or with `lines` one a line. ``.jsonl``/``.json``, ``.tsv``/``.csv`` (with a
    header) and ``.parquet`` give one document a row, from `column` or else the first of `CHAT_COLUMNS` and
    `TEXT_COLUMNS` they have; messages become text through `chat` (`chat_of`). An STS-B table gives both its
    sentences. Blank texts are dropped. Raises DataError naming the file.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        return [text for file in files_below(root) for text in read_documents(file, column, lines=lines, chat=chat)]
    documents = [text.strip() for text in _documents(root, column, lines, chat)]
    documents = [text for text in documents if text]
    if not documents:
        raise DataError(f"{root} holds no text", "give a file with text")
    return documents


def is_path(name: str) -> bool:
    """Whether a string is meant as a file or folder, not as a hub id."""
    marks = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or "\n" in name
    return marks or not name or Path(name).suffix in SUFFIXES or Path(name).exists()


def files_below(root: Path) -> list[Path]:
    """Every known file below a folder, sorted. Raises DataError when there is none."""
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    if not files:
        raise DataError(f"folder {root} holds no {', '.join(SUFFIXES)}", "name another folder or a file")
    return files


def chat_of(tokenizer: Any) -> Chat | None:
    """What turns messages into text: the tokenizer's chat template, if it has one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    return functools.partial(tokenizer.apply_chat_template, tokenize=False)


def read_labelled(path: PathLike) -> tuple[list[str], list[int]]:
    """Sentences and class numbers of a ``.tsv``/``.csv``/``.jsonl`` with a text column and a ``label``
    column.
    """
    file = Path(path)
    sentences, labels = [], []
    for number, row in enumerate(rows(file), start=1):
        sentence, label = row_text(row, f"{file} row {number}"), row.get("label")
        if label is None:
            raise DataError(f"{file} row {number} has no label", "name its columns in a header: sentence, label")
        try:
            labels.append(int(str(label).strip()))
        except ValueError as error:
            raise DataError(f"{file} row {number}: label {label!r} is no class number", "use 0, 1, ...") from error
        sentences.append(sentence.strip())
    if not sentences:
        raise DataError(f"{file} has no rows", "give a file with sentences and labels")
    return sentences, labels


def read_pairs(path: PathLike) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores of a table in STS-B's form.

    Tab-separated and without header or quoting: genre, file, year, index, score, sentence 1, sentence 2;
    columns after these are licences and are ignored. Raises DataError naming the first line that does not
    fit.
    """
    file = Path(path)
    first, second, scores = [], [], []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if not _is_pair(cells):
            fix = "each line holds genre, file, year, index, score, sentence 1, sentence 2 between tabs"
            raise DataError(f"{file} line {number} is no scored sentence pair", fix)
        first.append(cells[5].strip())
        second.append(cells[6].strip())
        scores.append(float(cells[4]))
    return first, second, scores


def _is_pair(cells: Sequence[str]) -> bool:
    if len(cells) < _STS_COLUMNS:
        return False
    try:
        float(cells[4])
    except ValueError:
        return False
    return True


def _documents(file: Path, column: str | None, lines: bool, chat: Chat | None) -> Iterator[str]:
    if is_pairs(file):
        for pair in zip(*read_pairs(file)[:2], strict=True):
            yield from pair
    elif file.suffix in SUFFIXES and file.suffix != ".txt":
        for number, row in enumerate(rows(file, column), start=1):
            yield row_text(row, f"{file} row {number}", column, chat)
    else:  # whatever its name: text is text, and the rest is refused
        text = read_text(file)
        yield from text.split("\n") if lines else (text,)


def is_pairs(file: Path) -> bool:
    """Whether a file is a table in STS-B's form."""
    return file.suffix == ".tsv" and _is_pair(next(text_lines(file, None), "").split("\t"))


def row_text(row: Mapping[str, object], where: str, column: str | None = None, chat: Chat | None = None) -> str:
    """The text of a row; "" for a blank one. Raises DataError, naming `where`, for a row without text."""
    for name in (column,) if column else (*CHAT_COLUMNS, *TEXT_COLUMNS):
        if name in row:
            value = row[name]
            if value is None:  # a null in JSON or parquet: blank
                return ""
            if isinstance(value, list):
                return _chat_text(value, where, chat)
            if not isinstance(value, str):
                raise DataError(f"{where}: {name!r} is no text", "give a column of text")
            return value
    wanted = repr(column) if column else f"text column ({', '.join(TEXT_COLUMNS)})"
    raise DataError(f"{where} has no {wanted}", f"it has {', '.join(map(str, row)) or 'nothing'}")


def _chat_text(messages: list[Any], where: str, chat: Chat | None) -> str:
    from jinja2 import TemplateError  # what transformers renders templates with

    if chat is None:
        raise DataError(f"{where} holds messages and the tokenizer has no chat template", "give a column of text")
    try:
        return chat(messages)
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        cause = f"{where}: the chat template cannot take its messages ({str(error)[:120]})"
        raise DataError(cause, 'write messages as [{"role": "user", "content": "..."}, ...]') from error


def rows(file: Path, column: str | None = None, skipped: Skipped | None = None) -> Iterator[dict[str, object]]:
    """The rows of a ``.parquet``, ``.jsonl``, ``.json``, ``.tsv`` or ``.csv``, read as they are asked for."""
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, column)
    elif file.suffix in (".jsonl", ".json"):
        yield from _json_rows(file, skipped)
    else:
        yield from _table_rows(file, skipped)


def bad(skipped: Skipped | None, reason: str, error: DataError) -> None:
    """Count what cannot be read, or raise where nothing may be skipped."""
    if skipped is None:
        raise error
    skipped[reason] += 1


def text_lines(file: Path, skipped: Skipped | None, part: int = LONGEST_LINE, *, whole: bool = True) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends, in constant memory.

    A line of more than `part` bytes is bad if `whole`, else it comes in parts. Binary and wrongly encoded lines are
    bad too.
    """
    check_kind(file)
    try:
        with file.open("rb") as stream:
            held, number = b"", 1
            while raw := stream.readline(part):
                ended, held = raw.endswith(b"\n"), held + raw
                if not ended and whole and len(raw) == part:
                    cause, fix = f"{file} line {number} is longer than {part >> 20} MiB", "give one document a line"
                    bad(skipped, "lines too long", DataError(cause, fix))
                    while (rest := stream.readline(part)) and not rest.endswith(b"\n"):
                        pass
                    held, number = b"", number + 1
                    continue
                text, held = _decoded(file, held, number, skipped, cut=not ended and len(raw) == part)
                number += ended
                yield text.removeprefix("\ufeff") if number <= 2 else text
    except FileNotFoundError as error:
        raise DataError(f"there is no file {file}", "check the path") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", "check its permissions") from error


def _decoded(file: Path, raw: bytes, number: int, skipped: Skipped | None, *, cut: bool) -> tuple[str, bytes]:
    """Text, and the bytes of a character that a cut went through."""
    if b"\0" in raw:
        bad(
            skipped, "binary lines", DataError(f"{file} is binary (line {number})", f"give text: {', '.join(SUFFIXES)}")
        )
        return "", b""
    try:
        return raw.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        if cut and error.end == len(raw) and len(raw) - error.start < 4:
            return raw[: error.start].decode("utf-8"), raw[error.start :]
        bad(skipped, "lines not UTF-8", DataError(f"{file} is not UTF-8 (line {number})", "convert it to UTF-8 text"))
        return "", b""


def _table_rows(file: Path, skipped: Skipped | None) -> Iterator[dict[str, object]]:
    lines = text_lines(file, skipped)
    # GLUE's and STS-B's tab-separated tables quote nothing; commas need quotes.
    table = csv.reader(lines) if file.suffix == ".csv" else csv.reader(lines, "excel-tab", quoting=csv.QUOTE_NONE)
    try:
        header = [name.strip() for name in next(table, [])]
        for number, cells in enumerate(table, start=1):
            if not cells:
                continue
            if len(cells) != len(header):
                cause = f"{file} row {number} has {len(cells)} columns, its header {len(header)}"
                bad(skipped, "rows unlike their header", DataError(cause, "mend the file, or check its delimiter"))
                continue
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{file} is no table: {error}", "check its delimiter and quotes") from error


def _json_rows(file: Path, skipped: Skipped | None) -> Iterator[dict[str, object]]:
    fix = 'write one {"text": "..."} a line'
    whole = file.suffix == ".json"
    for number, line in enumerate([read_text(file)] if whole else text_lines(file, skipped), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            bad(skipped, "lines not JSON", DataError(f"{file} is not valid JSON: line {number}: {error}", fix))
            continue
        for index, row in enumerate(value if whole and isinstance(value, list) else [value], start=number):
            if isinstance(row, (str, dict)):
                yield {"text": row} if isinstance(row, str) else row
            else:
                bad(skipped, "rows without text", DataError(f"{file} row {index} is no object", fix))


def _parquet_rows(file: Path, column: str | None) -> Iterator[dict[str, object]]:
    import pyarrow.parquet as parquet  # what datasets reads it with, less the copy in a cache
    from pyarrow import ArrowException

    if not file.exists():
        raise DataError(f"there is no file {file}", "check the path")
    check_kind(file)
    try:
        with parquet.ParquetFile(file) as table:
            names = [column, "label"] if column else [*CHAT_COLUMNS, *TEXT_COLUMNS, "label"]
            present = [name for name in names if name in table.schema_arrow.names]
            if not set(present) - {"label"}:
                raise DataError(
                    f"{file} has no {' or '.join(map(repr, names[:-1]))}",
                    f"it has {', '.join(table.schema_arrow.names)}",
                )
            for batch in table.iter_batches(columns=present):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {file} as parquet ({str(error)[:120]})", "write the file again") from error
