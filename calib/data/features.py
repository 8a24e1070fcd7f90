"""Text to counts: hashed uni- and bigrams of tokens at several granularities, vectorised over a batch of texts.

The features of hashed n-gram importance resampling (DSIR, arXiv 2302.03169) over the granularities of "Target-Aware
Language Modeling via Granular Data Sampling" (arXiv 2409.14705): subwords of the model's tokenizer, words, and pieces
of several words learned on the target. Hashes are 64-bit integer arithmetic: the same everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from calib.errors import InputError

Array = NDArray[Any]

KINDS = ("subword", "word", "pieces")
BUCKETS = 10_000
PRIOR = 64  # neutral n-grams beside a text's own: a few words prove little
SKETCH = 16  # bytes
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd
_PRIME = np.uint64(0x100000001B3)
_SALTS = {kind: np.uint64(index) for index, kind in enumerate(KINDS, start=1)}
_PIECES, _LONGEST, _OFTEN = 8000, 32, 3  # learned pieces; characters of one; times it has to occur


@dataclass(frozen=True)
class Counts:
    """N-grams of D texts. `buckets` [n] int64, text after text; `ends` [D] int64: where each text's end.

    `tokens` [D] int64: of the model's tokenizer. `sketches` [D, SKETCH] uint8 are alike where texts are: the share of
    equal bytes is about the Jaccard similarity of their word bigrams. `hashes` [D] uint64, of the exact text.
    """

    buckets: Array
    ends: Array
    tokens: Array
    sketches: Array
    hashes: Array

    def means(self, values: Array) -> Array:
        """Mean of values [buckets] over each text's n-grams and PRIOR zeros, float64 [D]."""
        sums = np.concatenate(([0.0], np.cumsum(values[self.buckets])))
        starts = np.concatenate(([0], self.ends[:-1]))
        return (sums[self.ends] - sums[starts]) / (self.ends - starts + PRIOR)


@dataclass(frozen=True)
class Features:
    """How texts are counted. `subword` is the model's tokenizer, `pieces` one that `learn_pieces` gives."""

    kinds: tuple[str, ...] = KINDS
    buckets: int = BUCKETS
    subword: Tokenizer | None = None
    pieces: Tokenizer | None = None

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise InputError(f"unknown features {','.join(self.kinds)!r}", f"use some of {', '.join(KINDS)}")
        if "subword" in self.kinds and self.subword is None:
            raise InputError("the subword features need a tokenizer", "name a model's, or use word and pieces")
        if self.buckets < 2:
            raise InputError(f"{self.buckets} buckets tell nothing apart", f"use {BUCKETS}")

    def count(self, texts: Sequence[str]) -> Counts:
        """The hashed n-grams of some texts."""
        words = word_ids(texts)
        subwords = None if self.subword is None else encoded(self.subword, texts)
        streams = {"word": words, "subword": subwords}
        if "pieces" in self.kinds:
            assert self.pieces is not None
            streams["pieces"] = encoded(self.pieces, texts)
        grams, owners = [], []
        for kind in self.kinds:
            ids, owner = streams[kind]  # type: ignore[misc]
            ones, twos, pairs = ngrams(ids, owner, _SALTS[kind])
            grams += [ones, twos]
            owners += [owner, pairs]
        of = np.concatenate(owners)
        order = np.argsort(of, kind="stable")
        lengths = np.bincount(of, minlength=len(texts))
        if subwords is None:  # about four bytes a token
            tokens = np.array([len(text.encode()) // 4 + 1 for text in texts], np.int64)
        else:
            tokens = np.bincount(subwords[1], minlength=len(texts))
        return Counts(
            (np.concatenate(grams)[order] % np.uint64(self.buckets)).astype(np.int64),
            np.cumsum(lengths),
            tokens,
            _sketches(*words, len(texts)),
            np.array([text_hash(text) for text in texts], np.uint64),
        )


def mix(x: Array) -> Array:
    """A 64-bit finalizer (splitmix64's): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def ngrams(ids: Array, owner: Array, salt: np.uint64) -> tuple[Array, Array, Array]:
    """Hashes of single tokens [n], of pairs within a text [p], and the pairs' texts [p]."""
    with np.errstate(over="ignore"):
        ones = mix(ids + salt * _GOLDEN)
        inside = np.flatnonzero(owner[1:] == owner[:-1])
        twos = mix(ones[inside] * _GOLDEN + ones[inside + 1])
    return ones, twos, owner[inside]


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Array, Array]:
    """Token ids uint64 [n] of all texts, and the text [n] each belongs to."""
    rows = [row.ids for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    ids = np.fromiter(itertools.chain.from_iterable(rows), np.uint64, sum(map(len, rows)))
    return ids, np.repeat(np.arange(len(rows)), [len(row) for row in rows])


def word_ids(texts: Sequence[str]) -> tuple[Array, Array]:
    """Hashes uint64 [n] of words, lower case, and of runs of punctuation; and the text [n] each belongs to.

    A word is a run of letters, digits, ``_`` and bytes beyond ASCII; its hash sum_j (byte_j + 1) prime^j mod 2^64.
    """
    raw = [text.lower().encode() for text in texts]
    data = np.frombuffer(b" ".join(raw) + b" ", np.uint8)
    kinds = _CLASSES[data]
    first = (kinds != 0) & (kinds != np.concatenate(([0], kinds[:-1])))
    starts = np.flatnonzero(first)
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    held = np.flatnonzero(kinds)
    place = held - starts[np.cumsum(first)[held] - 1]
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.concatenate(([np.uint64(1)], np.full(int(place.max()), _PRIME))), dtype=np.uint64)
        values = (data[held].astype(np.uint64) + np.uint64(1)) * powers[place]
        hashes = np.add.reduceat(values, np.flatnonzero(place == 0))
    ends = np.cumsum([len(row) + 1 for row in raw])
    return hashes, np.searchsorted(ends, starts, side="right")


def _byte_classes() -> Array:
    """Per byte: 0 white space and controls, 1 of a word, 2 punctuation."""
    classes = np.full(256, 1, np.uint8)
    for byte in range(128):
        letter = chr(byte)
        classes[byte] = 1 if letter.isalnum() or letter == "_" else 0 if byte <= 32 or byte == 127 else 2
    return classes


_CLASSES = _byte_classes()


def _sketches(words: Array, owner: Array, texts: int) -> Array:
    """Minima of SKETCH hashes over each text's words and word pairs, one byte of each."""
    ones, twos, pairs = ngrams(words, owner, np.uint64(0))
    alone = np.bincount(pairs, minlength=texts) == 0  # a text of one word
    keep = alone[owner]
    hashes, of = np.concatenate([twos, ones[keep]]), np.concatenate([pairs, owner[keep]])
    order = np.argsort(of, kind="stable")
    hashes, of = hashes[order], of[order]
    result = np.zeros((texts, SKETCH), np.uint8)
    if len(of):
        starts = np.flatnonzero(np.concatenate(([True], of[1:] != of[:-1])))
        for index in range(SKETCH):
            with np.errstate(over="ignore"):
                mixed = mix(hashes + np.uint64(index + 1) * _GOLDEN)
            result[of[starts], index] = np.minimum.reduceat(mixed, starts) & np.uint64(0xFF)
    return result


def text_hash(text: str) -> int:
    """64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def learn_pieces(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE learned without a split at words, so that its pieces run over several."""
    tokenizer = Tokenizer(models.BPE())
    # bounded at sentence marks: training time grows with the longest stretch
    marks = pre_tokenizers.Split(Regex(r"[.,;:!?\n]+"), "merged_with_previous")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([marks, bytes_])
    trainer = trainers.BpeTrainer(
        vocab_size=_PIECES,
        min_frequency=_OFTEN,
        max_token_length=_LONGEST,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
