"""Calibration data as token batches: equal windows of running text, or one padded sentence a row."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calib.data.builtin import builtin_documents
from calib.data.hub import hub_documents
from calib.data.read import CHAT_COLUMNS, TEXT_COLUMNS, Chat, chat_of, is_path, read_documents, row_text
from calib.data.select import Like
from calib.errors import DataError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
Data = Union[str, "os.PathLike[str]", Iterable[Any], Like, None]

_CHARS_PER_TOKEN = 32  # of text to choose from, several times what a token of any tokenizer takes
FEATURES = "input_features"  # what a speech model's processor makes of sound
_NO_LIMIT = 1_000_000  # tokenizers without a limit say 1e30


@dataclass(frozen=True)
class TokenData(Sequence[Batch]):
    """A short sequence of batches: ``input_ids`` [B, T] int64, ``attention_mask`` [B, T] int64 (1 = a
    real token). Of a speech model: ``input_features`` [B, mel, T] float and ``decoder_input_ids`` [B, L] int64.

    `tokens` counts the real tokens of its `rows` rows. `fingerprint` is a sha256 over the real token ids (and what
    comes with them) row by row, so that it does not depend on batch size or padding.
    """

    batches: tuple[Batch, ...]
    source: str
    fingerprint: str
    rows: int
    tokens: int

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Batch, ...]: ...
    def __getitem__(self, index: int | slice) -> Batch | tuple[Batch, ...]:
        return self.batches[index]


def calibration_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    *,
    pack: bool = True,
    batch_size: int = 8,
    limit: int | None = None,
    vocabulary: int | None = None,
    column: str | None = None,
) -> TokenData:
    """`samples` rows of at most `seq_len` tokens from `data`, the same for the same arguments.

    `data` is None (the built-in text, no network), a file or folder (`read_documents`), a hub id
    (``"wikitext"``, ``"id:configuration"``), or an iterable of strings, of rows with a text column, or of
    token dicts (``input_ids`` [T] or [B, T] and, if they like, ``attention_mask`` and further tensors of
    that shape; of a speech model ``input_features`` and ``decoder_input_ids``), which are taken as they
    come, as are the rows of a .safetensors file of such tensors; or `calib.data.like`, which chooses from
    a pool. Rows of messages become text through the tokenizer's chat template.

    With `pack` (language models) the documents are joined by blank lines and tokenized without special
    tokens; windows of exactly `seq_len` are drawn evenly across the text, one from each stretch. Without
    (encoders, classifiers) each row is one sentence with its special tokens, truncated and right-padded
    in its batch; rows are a seeded sample in given order. Fewer rows than `samples` are a warning, none
    is an error.

    `limit` is the longest sequence of the model (`sequence_limit`; default: what the tokenizer says),
    `vocabulary` the number of token ids it knows (default: unchecked).
    Raises InputError for lengths that do not fit, DataError for data that is missing, empty, binary or
    too short.
    """
    limit = sequence_limit(None, tokenizer) if limit is None else limit
    _check_counts(samples, seq_len, batch_size, limit)
    if isinstance(data, Like):
        data = data.select(tokenizer, samples, seq_len, seed, pack=pack).texts
    if isinstance(data, (str, os.PathLike)) and (file := os.fspath(data)).endswith(".safetensors"):
        return _describe(file, _as_batches(_token_file(file, batch_size), samples, limit), vocabulary)
    source, documents = _load(data, pack, samples, seq_len, column, chat_of(tokenizer))
    if not isinstance(documents, list):
        return _describe(source, _as_batches(documents, samples, limit), vocabulary)
    if tokenizer is None:
        raise DataError("the model has no tokenizer", "give token dicts with input_ids as data")
    generator = torch.Generator().manual_seed(seed)
    if pack:
        rows = _windows(documents, tokenizer, samples, seq_len, generator, source)
    else:
        if len(documents) > samples:
            chosen = torch.randperm(len(documents), generator=generator)[:samples].sort().values.tolist()
            documents = [documents[index] for index in chosen]
        rows = encode_rows(tokenizer, documents, seq_len)
    if len(rows) < samples:
        warnings.warn(f"{source} gives {len(rows)} of {samples} rows of {seq_len} tokens", stacklevel=2)
    return _describe(source, batch_rows(rows, tokenizer, batch_size), vocabulary)


def ids_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The token ids [B, T] of a batch: those of a speech model are its decoder's."""
    return batch["input_ids"] if "input_ids" in batch else batch["decoder_input_ids"]


def sequence_limit(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The longest sequence a model takes, from its config's position table or else its tokenizer; None
    for no limit.
    """
    said = getattr(tokenizer, "model_max_length", None)
    by_tokenizer = int(said) if said is not None and said < _NO_LIMIT else None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return by_tokenizer
    # RoBERTa's table holds two positions more than it can use; its tokenizer knows.
    if by_tokenizer is not None and positions - 2 <= by_tokenizer < positions:
        return by_tokenizer
    return positions


def encode_rows(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], max_len: int) -> list[list[int]]:
    """Token ids of each sentence with its special tokens, truncated to `max_len`."""
    encoded = tokenizer(list(sentences), truncation=True, max_length=max_len, padding=False)
    rows: list[list[int]] = encoded["input_ids"]
    if (empty := next((index for index, row in enumerate(rows) if not row), None)) is not None:
        raise DataError(f"row {empty + 1} has no tokens", "drop blank rows")
    return rows


def batch_rows(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Iterator[Batch]:
    """Batches of `rows` in order, right-padded to the longest of each batch."""
    # A tokenizer without a padding token pads with a real one: the mask hides it.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        ids = torch.full((len(chunk), max(map(len, chunk))), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(chunk):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, : len(row)] = 1
        yield {"input_ids": ids, "attention_mask": mask}


def _check_counts(samples: int, seq_len: int, batch_size: int, limit: int | None) -> None:
    if samples < 1 or batch_size < 1:
        raise InputError(f"{samples} samples in batches of {batch_size} are none", "both must be 1 or more")
    if seq_len < 2:
        raise InputError(f"sequences of {seq_len} tokens are too short", "use 2 or more")
    if limit is not None and seq_len > limit:
        raise InputError(
            f"sequences of {seq_len} tokens are beyond the model's limit of {limit}", f"use at most {limit}"
        )


def _load(
    data: Data, pack: bool, samples: int, seq_len: int, column: str | None, chat: Chat | None
) -> tuple[str, list[str] | Iterator[Any]]:
    """The data's name with its documents, or with an iterator of token dicts."""
    chars = _CHARS_PER_TOKEN * samples * seq_len
    if data is None:
        return "built-in text", builtin_documents(paragraphs=not pack)
    if isinstance(data, os.PathLike) or (isinstance(data, str) and is_path(data)):
        return str(data), read_documents(data, column, lines=not pack, chat=chat)
    if isinstance(data, str):
        return data, hub_documents(data, chars=chars, column=column, chat=chat)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        fix = "give a file, a folder, a hub id, or an iterable of strings or token dicts"
        raise DataError(f"cannot calibrate with a {type(data).__name__}", fix)
    return _load_iterable(iter(data), chars, column, chat)


def _load_iterable(
    items: Iterator[Any], chars: int, column: str | None, chat: Chat | None
) -> tuple[str, list[str] | Iterator[Any]]:
    source = "given data"
    documents: list[str] = []
    held = 0
    for item in items:
        if isinstance(item, Tensor) or (isinstance(item, Mapping) and not {"input_ids", FEATURES}.isdisjoint(item)):
            if documents:
                raise DataError("the data mixes strings and token dicts", "give one kind")
            return source, _chain(item, items)
        number = len(documents) + 1
        if isinstance(item, Mapping) and (column or any(name in item for name in (*CHAT_COLUMNS, *TEXT_COLUMNS))):
            item = row_text(item, f"item {number} of the data", column, chat)
        if not isinstance(item, str):
            fix = f"give strings, rows with {' or '.join(TEXT_COLUMNS)}, or dicts with input_ids"
            raise DataError(f"item {number} of the data is neither text nor tokens", fix)
        if item := item.strip():
            documents.append(item)
            held += len(item)
        if held >= chars:  # the iterable may be endless
            break
    if not documents:
        raise DataError("the data holds no text", "give strings or token dicts")
    return source, documents


def _token_file(file: str, batch_size: int) -> Iterator[Batch]:
    """Token dicts of a .safetensors file, ``batch_size`` rows at a time."""
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            rows = {name: part.get_shape()[0] if part.get_shape() else 0 for name, part in parts.items()}
            if len(set(rows.values())) != 1:
                raise DataError(f"{file} has tensors of {rows} rows", "give as many rows of each")
            for start in range(0, next(iter(rows.values())), batch_size):
                yield {name: part[start : start + batch_size] for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read tokens from {file} ({error})", "check the path, or save it again") from error


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    generator: torch.Generator,
    source: str,
) -> list[list[int]]:
    text = _thin("\n\n".join(documents), samples, seq_len, generator)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // seq_len
    if count == 0:
        fix = f"give more text or windows of at most {max(len(ids), 2)} tokens"
        raise DataError(f"{source} holds {len(ids)} tokens, fewer than one window of {seq_len}", fix)
    if count > samples:  # one window from each of `samples` equal stretches
        edges = [count * index // samples for index in range(samples + 1)]
        draw = torch.rand(samples, generator=generator, dtype=torch.float64).tolist()
        pairs = zip(edges[:-1], edges[1:], draw, strict=True)
        starts = [low + int(part * (high - low)) for low, high, part in pairs]
    else:
        starts = list(range(count))
    return [ids[start * seq_len : (start + 1) * seq_len] for start in starts]


def _thin(text: str, samples: int, seq_len: int, generator: torch.Generator) -> str:
    """A long text cut down to one excerpt from each of `samples` equal stretches: tokenizing all of it
    would take minutes.
    """
    if len(text) <= _CHARS_PER_TOKEN * samples * seq_len:
        return text
    stretch, length = len(text) // samples, _CHARS_PER_TOKEN * seq_len // 2
    draw = torch.rand(samples, generator=generator, dtype=torch.float64).tolist()
    starts = [int(stretch * index + part * (stretch - length)) for index, part in enumerate(draw)]
    excerpts = (text[start : start + length].partition(" ")[2] or text[start : start + length] for start in starts)
    return "\n\n".join(excerpts)


def _as_batches(items: Iterable[Any], samples: int, limit: int | None) -> Iterator[Batch]:
    """Given token dicts, checked and made [B, T] int64, until they hold `samples` rows."""
    rows = 0
    for number, item in enumerate(items, start=1):
        batch = _as_batch({"input_ids": item} if isinstance(item, Tensor) else item, number)
        length = ids_of(batch).shape[1]
        if limit is not None and length > limit:
            cause = f"item {number} of the data has {length} tokens, beyond the model's limit of {limit}"
            raise DataError(cause, "cut it")
        batch = {key: value[: samples - rows] for key, value in batch.items()}
        rows += len(ids_of(batch))
        yield batch
        if rows >= samples:
            return


def _as_batch(item: Any, number: int) -> Batch:
    kind = "decoder_input_ids" if isinstance(item, Mapping) and FEATURES in item else "input_ids"
    if not isinstance(item, Mapping) or kind not in item:
        fix = "give one kind: all token dicts" if kind == "input_ids" else "add the transcript: the decoder reads it"
        raise DataError(f"item {number} of the data has no {kind}", fix)
    try:
        tensors = {key: torch.as_tensor(value) for key, value in item.items() if key != "labels"}
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"item {number} of the data is no tensor: {error}", "give rows of equal length") from error
    ids = tensors[kind]
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2) or ids.numel() == 0:
        shape = f"{ids.dtype} {list(ids.shape)}"
        raise DataError(f"item {number} of the data: {kind} are {shape}", "give integers [T] or [B, T]")
    if int(ids.min()) < 0:
        raise DataError(f"item {number} of the data has a negative token id", "mask padding, do not mark it")
    if FEATURES in tensors:
        return _speech(tensors, ids, number)
    tensors.setdefault("attention_mask", torch.ones_like(ids))
    for key, value in tensors.items():
        if value.shape != ids.shape:
            cause = f"item {number} of the data: {key} is {list(value.shape)}, input_ids {list(ids.shape)}"
            raise DataError(cause, "give both the same shape")
    batch = {
        key: (value if value.is_floating_point() else value.long()).reshape(-1, ids.shape[-1])
        for key, value in tensors.items()
    }
    if not bool(batch["attention_mask"].any(dim=1).all()):
        raise DataError(f"item {number} of the data has a row without a real token", "drop it")
    return batch


def _speech(tensors: Batch, ids: Tensor, number: int) -> Batch:
    """input_features [B, mel, T] with decoder_input_ids [B, L]; other tensors are left out: features are not padded."""
    features = tensors[FEATURES]
    if features.dim() == 2:
        features = features[None]
    ids = ids.long().reshape(-1, ids.shape[-1])
    if not features.is_floating_point() or features.dim() != 3 or len(features) != len(ids):
        cause = f"{FEATURES} are {features.dtype} {list(features.shape)}, decoder_input_ids {list(ids.shape)}"
        raise DataError(f"item {number} of the data: {cause}", "give floats [B, mel, T] and integers [B, L]")
    if not bool(torch.isfinite(features).all()):
        raise DataError(f"item {number} of the data: {FEATURES} hold NaN or inf", "drop it")
    return {FEATURES: features, "decoder_input_ids": ids}


def _describe(source: str, batches: Iterable[Batch], vocabulary: int | None) -> TokenData:
    held = tuple(batches)
    largest = max((int(batch[key].max()) for batch in held for key in batch if key.endswith("input_ids")), default=0)
    if vocabulary is not None and largest >= vocabulary:
        cause = f"{source} holds token id {largest}, and the model's vocabulary has {vocabulary} entries"
        raise DataError(cause, "use the tokenizer that belongs to the model")
    digest = hashlib.sha256()
    rows = tokens = 0
    for batch in held:
        ids = ids_of(batch)
        masks = batch.get("attention_mask", torch.ones_like(ids)).bool()
        extra = sorted(key for key in batch.keys() - {"attention_mask"} if batch[key] is not ids)
        for index, mask in enumerate(masks):
            real = ids[index][mask]
            digest.update(f"{len(real)}:".encode() + real.cpu().numpy().astype("<i8").tobytes())
            for key in extra:
                more = batch[key][index] if key == FEATURES else batch[key][index][mask]
                digest.update(key.encode() + more.cpu().numpy().tobytes())
            rows += 1
            tokens += len(real)
    if not rows:
        raise DataError("the data holds no rows", "give strings or token dicts")
    return TokenData(held, source, digest.hexdigest(), rows, tokens)
