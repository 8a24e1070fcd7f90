"""Text from the Hugging Face hub, streamed: only as much as calibration needs is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from calib.data.read import Chat, row_text
from calib.errors import DataError

_ALIASES = {  # short name: dataset, configuration
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "c4": ("allenai/c4", "en"),
}


def hub_documents(
    name: str, *, chars: int, column: str | None = None, split: str = "train", chat: Chat | None = None
) -> list[str]:
    """Texts from the start of `split` of dataset `name` (``"id"`` or ``"id:configuration"``) until they
    hold `chars`.

    Raises DataError when the dataset cannot be reached or has no text column.
    """
    documents: list[str] = []
    held = 0
    for number, row in enumerate(hub_rows(name, split), start=1):
        if text := row_text(row, f"dataset {name!r} row {number}", column, chat).strip():
            documents.append(text)
            held += len(text)
        if held >= chars:
            break
    if not documents:
        raise DataError(f"dataset {name!r} holds no text in split {split!r}", "name another dataset")
    return documents


def hub_rows(name: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """The rows of a dataset, streamed."""
    dataset, _, configuration = name.partition(":")
    if not configuration:
        dataset, configuration = _ALIASES.get(dataset, (dataset, ""))
    import datasets

    try:
        yield from datasets.load_dataset(dataset, configuration or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(
            f"there is no file {name!r} and the hub gave no such dataset ({reason})",
            "give a local file or folder, or leave --data out for the built-in text",
        ) from error
