"""Files to text: documents for calibration, labelled sentences and sentence pairs for evaluation."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from calib.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json", ".tsv", ".csv", ".parquet")
TEXT_COLUMNS = ("text", "sentence", "content", "document", "question", "prompt")
_STS_COLUMNS = 7  # genre, file, year, score, two sentences, and in STS-B's index also a number

PathLike = str | os.PathLike[str]


def read_text(path: PathLike) -> str:
    """The whole of a UTF-8 text file. Raises DataError when it is missing, unreadable, empty or binary."""
    file = Path(path)
    if not file.exists():
        raise DataError(f"there is no file {file}", "check the path")
    if file.is_dir():
        raise DataError(f"{file} is a folder", "name a file in it")
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


def read_documents(path: PathLike, column: str | None = None, *, lines: bool = False) -> list[str]:
    """The texts in a file, or in every known file below a folder in sorted order.

    ``.txt`` is one document, or with `lines` one a line. ``.jsonl``/``.json``, ``.tsv``/``.csv`` (with a
    header) and ``.parquet`` give one document a row, from `column` or else the first of `TEXT_COLUMNS`
    they have; an STS-B table gives both its sentences. Blank texts are dropped. Raises DataError naming
    the file.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"folder {root} holds no {', '.join(SUFFIXES)}", "name another folder or a file")
        return [text for file in files for text in read_documents(file, column, lines=lines)]
    documents = [text.strip() for text in _documents(root, column, lines)]
    documents = [text for text in documents if text]
    if not documents:
        raise DataError(f"{root} holds no text", "give a file with text")
    return documents


def read_labelled(path: PathLike) -> tuple[list[str], list[int]]:
    """Sentences and class numbers of a ``.tsv``/``.csv``/``.jsonl`` with a text column and a ``label``
    column.
    """
    file = Path(path)
    sentences, labels = [], []
    for number, row in enumerate(_rows(file), start=1):
        sentence, label = _cell(file, row, None, number), row.get("label")
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


def _documents(file: Path, column: str | None, lines: bool) -> Iterator[str]:
    if file.suffix == ".tsv" and _is_pair(read_text(file).split("\n", 1)[0].split("\t")):
        for pair in zip(*read_pairs(file)[:2], strict=True):
            yield from pair
    elif file.suffix in SUFFIXES and file.suffix != ".txt":
        for number, row in enumerate(_rows(file, column), start=1):
            yield _cell(file, row, column, number)
    else:  # whatever its name: text is text, and the rest is refused
        text = read_text(file)
        yield from text.split("\n") if lines else (text,)


def _cell(file: Path, row: dict[str, object], column: str | None, number: int) -> str:
    for name in (column,) if column else TEXT_COLUMNS:
        if name in row:
            value = row[name]
            if value is None:  # a null in JSON or parquet: blank
                return ""
            if not isinstance(value, str):
                raise DataError(f"{file} row {number}: {name!r} is no text", "give a column of text")
            return value
    wanted = repr(column) if column else f"text column ({', '.join(TEXT_COLUMNS)})"
    raise DataError(f"{file} row {number} has no {wanted}", f"it has {', '.join(map(str, row)) or 'nothing'}")


def _rows(file: Path, column: str | None = None) -> Iterator[dict[str, object]]:
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, column)
    elif file.suffix in (".jsonl", ".json"):
        yield from _json_rows(file)
    else:
        yield from _table_rows(file)


def _table_rows(file: Path) -> Iterator[dict[str, object]]:
    text = io.StringIO(read_text(file), newline="")
    # GLUE's and STS-B's tab-separated tables quote nothing; commas need quotes.
    table = csv.reader(text) if file.suffix == ".csv" else csv.reader(text, "excel-tab", quoting=csv.QUOTE_NONE)
    try:
        header = [name.strip() for name in next(table)]
        for number, cells in enumerate(table, start=1):
            if not cells:
                continue
            if len(cells) != len(header):
                counts = f"{len(cells)} columns, its header {len(header)}"
                raise DataError(f"{file} row {number} has {counts}", "mend the file, or check its delimiter")
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{file} is no table: {error}", "check its delimiter and quotes") from error


def _json_rows(file: Path) -> Iterator[dict[str, object]]:
    text = read_text(file)
    whole = file.suffix == ".json"
    try:
        rows = json.loads(text) if whole else map(json.loads, filter(str.strip, text.split("\n")))
        for number, row in enumerate([rows] if isinstance(rows, dict) else rows, start=1):
            if isinstance(row, str):
                row = {"text": row}
            if not isinstance(row, dict):
                raise DataError(f"{file} row {number} is no object", 'write one {"text": "..."} a line')
            yield row
    except (json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{file} is not valid JSON: {error}", 'write one {"text": "..."} a line') from error


def _parquet_rows(file: Path, column: str | None) -> Iterator[dict[str, object]]:
    import pyarrow.parquet as parquet  # what datasets reads it with, less the copy in a cache
    from pyarrow import ArrowException

    if not file.exists():
        raise DataError(f"there is no file {file}", "check the path")
    try:
        with parquet.ParquetFile(file) as table:
            names = [column] if column else [*TEXT_COLUMNS, "label"]
            present = [name for name in names if name in table.schema_arrow.names]
            if not present:
                raise DataError(
                    f"{file} has no {' or '.join(map(repr, names))}",
                    f"it has {', '.join(table.schema_arrow.names)}",
                )
            for batch in table.iter_batches(columns=present):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {file} as parquet ({str(error)[:120]})", "write the file again") from error
