"""Choose from a pool the windows that look like the target: importance sampling over hashed n-grams.

Two passes that count n-grams, the first over a share of a large pool, and one that only reads. Memory does not grow
with the pool: what is known of each piece, 40 bytes, lies in a temporary file. The number of processes does not change
what is drawn, for the noise is keyed by each text's hash.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from calib.data.features import BUCKETS, KINDS, SKETCH, Array, Features, learn_pieces, text_hash
from calib.data.parallel import ordered_map
from calib.data.pool import Piece, Pool, Source
from calib.data.read import chat_of
from calib.data.weights import divergence, gumbel, log_ratio, temperature
from calib.errors import DataError, InputError

SPREAD = 4  # effective sample size over what is drawn
ALIKE = 12 / SKETCH  # of two sketches' bytes: texts that repeat each other
_RECORD = np.dtype([("score", "<f8"), ("hash", "<u8"), ("tokens", "<u4"), ("mass", "<u4"), ("sketch", "u1", SKETCH)])
_BATCH = 1 << 19  # characters counted at once
_COUNTED = 1 << 24  # bytes of the pool that its distribution is estimated from: thousands of n-grams a bucket
_TARGET = 1 << 24  # characters of the target that are read
_CHUNK = 1 << 20  # records held at once
_BINS = 1 << 16


@dataclass(frozen=True)
class Selection:
    """What was chosen. `rows`: text, label, tokens, log_weight, share (importance or uniform), in the pool's order.

    `sample` are texts drawn from the pool evenly, to compare with; `report` is plain JSON (calib.data.report).
    """

    rows: list[dict[str, Any]]
    sample: list[str]
    report: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.rows]


@dataclass(frozen=True)
class Like:
    """Calibration data to be chosen once tokenizer and window size are known; see `like`."""

    target: Source
    pool: Source
    options: dict[str, Any] = field(default_factory=dict)

    def select(self, tokenizer: Any, windows: int, seq_len: int, seed: int, *, pack: bool) -> Selection:
        sizes: dict[str, Any] = {"windows": windows, "seq_len": seq_len, "seed": seed, "pack": pack}
        return select(self.pool, self.target, tokenizer, **sizes, **self.options)


def like(target: Source, pool: Source, **options: Any) -> Like:
    """Data for `calib.quantize`: the windows of `pool` that look like `target`. Options as for `select`."""
    return Like(target, pool, options)


def select(
    pool: Source,
    target: Source,
    tokenizer: Any = None,
    *,
    windows: int = 128,
    seq_len: int = 512,
    pack: bool = True,
    uniform: float = 0.25,
    seed: int = 0,
    processes: int = 1,
    features: Sequence[str] | None = None,
    buckets: int = BUCKETS,
    column: str | None = None,
    progress: bool = False,
) -> Selection:
    """Texts of `pool` for `windows` windows of `seq_len` tokens, drawn without replacement by likeness to `target`.

    A piece of the pool (a document, or at most about a window of it) weighs exp(tau * its mean over n-grams of
    log p_target - log p_pool), p with Laplace smoothing over `buckets`, the mean with a prior for short texts
    (`Counts.means`); tau makes the effective sample size 4 times what is drawn, or an eighth of a small pool.
    `uniform` is the share drawn evenly, for ranges off the target. What repeats a piece already drawn (three
    quarters of its word bigrams) is left out.

    pack: draw until the texts joined fill the windows (language models); else one text a window. features: of
    `KINDS`; by default all, without a tokenizer all but subword, tokens then being counted as four bytes. column:
    of rows; by default the first text or chat column. Sources are files, folders, hub ids, or iterables of rows or
    strings that can be read more than once.

    Raises DataError for a pool without text and a target of less than one window, InputError for options.
    """
    if windows < 1 or seq_len < 2 or not 0 <= uniform <= 1 or processes < 1:
        cause = f"{windows} windows of {seq_len} tokens, a share of {uniform} and {processes} processes do not fit"
        raise InputError(cause, "use 1 or more windows of 2 or more tokens, a share from 0 to 1, 1 or more processes")
    subword = _fast(tokenizer)
    kinds = tuple(features or [kind for kind in KINDS if kind != "subword" or subword is not None])
    chat = chat_of(tokenizer)
    example = Pool(target, 4 * seq_len, column=column, chat=chat)
    wanted = list(_within(example))
    pieces = learn_pieces(wanted) if "pieces" in kinds else None
    counter = Features(kinds, buckets, subword, pieces)
    tokens, target_bag = 0, np.zeros(buckets, np.int64)
    for batch in _batches(wanted):
        counts = counter.count(batch)
        target_bag += np.bincount(counts.buckets, minlength=buckets)
        tokens += int(counts.tokens.sum())
    if tokens < seq_len:
        cause = f"the target holds {tokens} tokens, fewer than one window of {seq_len}"
        raise DataError(cause, "give more text of the target, or shorter windows")

    source = Pool(pool, max(8, seq_len * sum(map(len, wanted)) // tokens), column=column, chat=chat)
    with tempfile.TemporaryFile() as file, tqdm(unit="piece", disable=not progress) as bar:
        pool_bag = _count(source, counter, processes, bar)
        ratio = log_ratio(target_bag, pool_bag)
        records = _score(source, counter, ratio, processes, file, bar, pack)
        repeated = _drop_repeats(records)
        draw = _Draw(records, seed, total := windows * (seq_len if pack else 1))
        if not draw.mass:
            raise DataError("the pool's texts have no tokens", "use the tokenizer that belongs to the model")
        sought = min(SPREAD * total * (1 - uniform), draw.mass / 8)
        draw.tau, effective = temperature(*_histogram(records), max(sought, 1.0))
        draw.take("importance", total * (1 - uniform))
        draw.take("uniform", total)
        even = set(draw.evenly())
        rows, sample = [], []
        for index, piece in enumerate(source.pieces()):
            if index in even:
                sample.append(piece.text)
            if index in draw.shares:
                if text_hash(piece.text) != records["hash"][index]:
                    raise DataError("the pool changed while it was read", "run again on files that stay as they are")
                rows.append(_row(piece, records[index], draw.shares[index]))
        scores = _sample_scores(records)
        pieces_read = len(records)
    if draw.drawn < total:
        unit = "tokens" if pack else "texts"
        warnings.warn(f"the pool gives {draw.drawn} of {total} {unit} without repeating itself", stacklevel=2)
    chosen_bag, even_bag = (
        sum(map(counter.bag, _batches(texts)), np.zeros(buckets, np.int64))
        for texts in ([row["text"] for row in rows], sample)
    )
    report = {
        "windows": windows,
        "seq_len": seq_len,
        "pack": pack,
        "seed": seed,
        "features": list(kinds),
        "chosen": {"pieces": len(rows), "tokens": sum(row["tokens"] for row in rows)},
        "pool": {"pieces": pieces_read, "tokens": draw.tokens, "repeated": repeated, "skipped": dict(source.skipped)},
        "target": {"pieces": len(wanted), "tokens": tokens, "skipped": dict(example.skipped)},
        "near_duplicates": draw.near,
        "tau": draw.tau,
        "effective_sample_size": effective / (seq_len if pack else 1),
        "kl_target_pool": divergence(target_bag, pool_bag),
        "kl_target_even": divergence(target_bag, even_bag),
        "kl_target_chosen": divergence(target_bag, chosen_bag),
        "labels": _labels(rows, source.labels),
        "log_weights": {"pool": scores, "chosen": [round(row["log_weight"], 4) for row in rows]},
        "complete": draw.drawn >= total,
    }
    return Selection(rows, sample, report)


class _Draw:
    """Draws without replacement: the largest of log weight + Gumbel noise, less what repeats those before it."""

    def __init__(self, records: Array, seed: int, total: int) -> None:
        self.records, self.seed, self.total = records, seed, total
        self.tau = 0.0
        self.mass = sum(int(chunk["mass"].sum(dtype=np.int64)) for _, chunk in _chunks(records))
        self.tokens = sum(int(chunk["tokens"].sum(dtype=np.int64)) for _, chunk in _chunks(records))
        self.shares: dict[int, str] = {}
        self.drawn, self.near = 0, 0
        self._sketches = np.zeros((0, SKETCH), np.uint8)

    def take(self, share: str, until: float) -> None:
        """Draw from all that is left until the mass of all draws reaches `until`."""
        tau, stream = (self.tau, 0) if share == "importance" else (0.0, 1)
        for index in _descending(self.records, lambda c: tau * c["score"] + gumbel(c["hash"], self.seed, stream)):
            if self.drawn >= until:
                return
            if index in self.shares:
                continue
            sketch = self.records["sketch"][index]
            if len(self._sketches) and (self._sketches == sketch).mean(axis=1).max() >= ALIKE:
                self.near += 1
                continue
            self._sketches = np.vstack([self._sketches, sketch])
            self.shares[index] = share
            self.drawn += int(self.records["mass"][index])

    def evenly(self) -> Iterator[int]:
        """As much again, drawn evenly from the whole pool."""
        drawn = 0
        for index in _descending(self.records, lambda c: gumbel(c["hash"], self.seed, 2)):
            if drawn >= self.total:
                return
            drawn += int(self.records["mass"][index])
            yield index


def _descending(records: Array, key_of: Callable[[Array], Array]) -> Iterator[int]:
    """Indices of the records with a mass, from the largest key down; a scan of all for every _BINS of them."""
    bound = np.inf
    while True:
        keys, indices = np.empty(0), np.empty(0, np.int64)
        for start, chunk in _chunks(records):
            key = key_of(chunk)
            fits = np.flatnonzero((chunk["mass"] > 0) & (key < bound))
            keys, indices = np.concatenate([keys, key[fits]]), np.concatenate([indices, start + fits])
            if len(keys) > _BINS:
                best = np.argpartition(keys, -_BINS)[-_BINS:]
                keys, indices = keys[best], indices[best]
        if not len(keys):
            return
        yield from map(int, indices[np.lexsort((indices, -keys))])
        bound = keys.min()


@dataclass(frozen=True)
class _Scores:
    """Work of the second pass: a batch's records."""

    counter: Features
    ratio: Array
    pack: bool

    def __call__(self, texts: list[str]) -> Array:
        counts = self.counter.count(texts)
        records = np.zeros(len(texts), _RECORD)
        records["score"], records["hash"] = counts.means(self.ratio), counts.hashes
        records["sketch"], records["tokens"] = counts.sketches, counts.tokens
        records["mass"] = counts.tokens if self.pack else np.minimum(counts.tokens, 1)
        return records


def _count(pool: Pool, counter: Features, processes: int, bar: tqdm) -> Array:
    """The pool's n-gram counts, of the texts whose hash falls into a share that a large pool needs no more than."""
    rate = max(1, pool.bytes // _COUNTED)
    bar.set_description("count the pool")
    texts = (piece.text for piece in pool.pieces())
    kept = texts if rate == 1 else (text for text in texts if text_hash(text) % rate == 0)
    bag = np.zeros(counter.buckets, np.int64)
    for counts in ordered_map(counter.bag, _batches(kept), processes):
        bag += counts
    if not bag.any():
        skipped = ", ".join(f"{count} {reason}" for reason, count in pool.skipped.items())
        raise DataError(f"the pool holds no text{f' (skipped: {skipped})' if skipped else ''}", "give files with text")
    return bag


def _score(
    pool: Pool, counter: Features, ratio: Array, processes: int, file: IO[bytes], bar: tqdm, pack: bool
) -> Array:
    """Every piece's record, in a file mapped into memory."""
    bar.set_description("weigh the pool")
    texts = (piece.text for piece in pool.pieces())
    for records in ordered_map(_Scores(counter, ratio, pack), _batches(texts), processes):
        file.write(records.tobytes())
        bar.update(len(records))
    file.flush()
    return np.memmap(file, _RECORD, "r+")


def _drop_repeats(records: Array) -> int:
    """Take the mass from every record whose text came before; how many. Exact, a share of the hashes at a time."""
    parts, dropped = -(-len(records) // (8 * _CHUNK)), 0
    for part in range(parts):
        where = np.concatenate(
            [start + np.flatnonzero(chunk["hash"] % np.uint64(parts) == part) for start, chunk in _chunks(records)]
        )
        order = where[np.argsort(records["hash"][where], kind="stable")]
        again = order[1:][records["hash"][order[1:]] == records["hash"][order[:-1]]]
        records["mass"][again] = 0
        dropped += len(again)
    return dropped


def _histogram(records: Array) -> tuple[Array, Array]:
    """Scores and their mass, in fine bins."""
    parts = [chunk["score"][chunk["mass"] > 0] for _, chunk in _chunks(records)]
    low, high = min(p.min() for p in parts if len(p)), max(p.max() for p in parts if len(p))
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    mass = sum(np.histogram(chunk["score"], edges, weights=chunk["mass"])[0] for _, chunk in _chunks(records))
    held = np.flatnonzero(mass)
    return (edges[held] + edges[held + 1]) / 2, np.asarray(mass)[held]


def _sample_scores(records: Array, count: int = 2000) -> list[float]:
    step = max(1, len(records) // count)
    return [round(float(score), 4) for score in records["score"][::step][:count]]


def _row(piece: Piece, record: Any, share: str) -> dict[str, Any]:
    figures = {"tokens": int(record["tokens"]), "log_weight": float(record["score"]), "share": share}
    return {"text": piece.text, "label": piece.label, **figures}


def _labels(rows: Sequence[dict[str, Any]], pool: Counter[str]) -> dict[str, dict[str, float]]:
    """Per label its share of the pool's characters, and of the tokens drawn by importance and of all drawn."""
    drawn = {"importance": [r for r in rows if r["share"] == "importance"], "all": list(rows)}

    def share(kind: str, label: str) -> float:
        total = sum(row["tokens"] for row in drawn[kind])
        return sum(row["tokens"] for row in drawn[kind] if row["label"] == label) / max(total, 1)

    return {
        label: {"pool": count / pool.total(), **{kind: share(kind, label) for kind in drawn}}
        for label, count in pool.most_common()
    }


def _chunks(records: Array) -> Iterator[tuple[int, Array]]:
    for start in range(0, len(records), _CHUNK):
        yield start, records[start : start + _CHUNK]


def _batches(texts: Any) -> Iterator[list[str]]:
    """Lists of texts of about _BATCH characters."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= _BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _within(pool: Pool) -> Iterator[str]:
    """The pool's texts, up to _TARGET characters."""
    held = 0
    for piece in pool.pieces():
        if held >= _TARGET:
            return
        held += len(piece.text)
        yield piece.text


def _fast(tokenizer: Any) -> Any:
    """The Rust tokenizer inside a transformers one, of whole texts: some files say how to cut and pad them."""
    if tokenizer is None:
        return None
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise InputError(f"{type(tokenizer).__name__} is a slow tokenizer", "use one with a tokenizer.json")
    if fast.truncation or fast.padding:
        fast = Tokenizer.from_str(fast.to_str())
        fast.no_truncation()
        fast.no_padding()
    return fast
