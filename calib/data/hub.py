"""Text from the Hugging Face hub, streamed: only as much as calibration needs is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from calib.data.read import TEXT_COLUMNS
from calib.errors import DataError

_ALIASES = {  # short name: dataset, configuration
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "c4": ("allenai/c4", "en"),
}


def hub_documents(name: str, *, chars: int, column: str | None = None, split: str = "train") -> list[str]:
    """Texts from the start of `split` of dataset `name` (``"id"`` or ``"id:configuration"``) until they
    hold `chars`.

    Raises DataError when the dataset cannot be reached or has no text column.
    """
    dataset, _, configuration = name.partition(":")
    if not configuration:
        dataset, configuration = _ALIASES.get(dataset, (dataset, ""))
    import datasets

    try:
        stream = datasets.load_dataset(dataset, configuration or None, split=split, streaming=True)
        documents = _take(stream, name, chars, column)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(
            f"there is no file {name!r} and the hub gave no such dataset ({reason})",
            "give a local file or folder, or leave --data out for the built-in text",
        ) from error
    if not documents:
        raise DataError(f"dataset {name!r} holds no text in split {split!r}", "name another dataset")
    return documents


def _take(rows: Iterable[dict[str, Any]], name: str, chars: int, column: str | None) -> list[str]:
    documents: list[str] = []
    held = 0
    for row in rows:
        if column is None:
            column = next((key for key in TEXT_COLUMNS if isinstance(row.get(key), str)), None)
        if column is None or not isinstance(row.get(column), str):
            wanted = column or " or ".join(TEXT_COLUMNS)
            raise DataError(f"dataset {name!r} has no text column {wanted}", f"it has {', '.join(row)}")
        if text := row[column].strip():
            documents.append(text)
            held += len(text)
        if held >= chars:
            break
    return documents
