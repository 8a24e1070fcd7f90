"""Text to counts: hashed uni- and bigrams of tokens at several granularities, vectorised over a batch of texts.

The features of hashed n-gram importance resampling (DSIR, arXiv 2302.03169) over the granularities of "Target-Aware
Language Modeling via Granular Data Sampling" (arXiv 2409.14705): subwords of the model's tokenizer, words, and pieces
of several words learned on the target. Hashes are 64-bit integer arithmetic: the same everywhere.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from calib.data.encode import Encoder, Merges, encoder, polynomial
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
    """N-grams of D texts. `buckets` [n] int64 and `owners` [n] int64: the text of each, a text's own in a fixed order.

    `tokens` [D] int64: of the model's tokenizer. `sketches` [D, SKETCH] uint8 are alike where texts are: the share of
    equal bytes is about the Jaccard similarity of their word bigrams. `hashes` [D] uint64, of the exact text.
    """

    buckets: Array
    owners: Array
    tokens: Array
    sketches: Array
    hashes: Array

    def means(self, values: Array) -> Array:
        """Mean of values [buckets] over each text's n-grams and PRIOR zeros, float64 [D]."""
        texts = len(self.hashes)
        sums = np.bincount(self.owners, values[self.buckets], minlength=texts)
        return sums / (np.bincount(self.owners, minlength=texts) + PRIOR)


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
        """The hashed n-grams of some texts, and what else is known of each."""
        words = word_ids(texts)
        subwords = None if self._subwords is None else self._subwords(texts)
        if subwords is None:  # about four bytes a token
            tokens = np.array([len(text.encode()) // 4 + 1 for text in texts], np.int64)
        else:
            tokens = np.bincount(subwords[1], minlength=len(texts))
        hashes = np.array([text_hash(text) for text in texts], np.uint64)
        buckets, owners = map(np.concatenate, zip(*self._grams(texts, word=words, subword=subwords), strict=True))
        return Counts(buckets, owners, tokens, _sketches(*words, len(texts)), hashes)

    def bag(self, texts: Sequence[str]) -> Array:
        """How often each bucket occurs, int64 [buckets]."""
        return sum(
            (np.bincount(grams, minlength=self.buckets) for grams, _ in self._grams(texts)),
            np.zeros(self.buckets, np.int64),
        )

    def _grams(self, texts: Sequence[str], **known: tuple[Array, Array] | None) -> Iterator[tuple[Array, Array]]:
        """Of every granularity buckets of tokens and of pairs, int64, each with their texts."""
        encoders = {"word": word_ids, "subword": self._subwords, "pieces": self._merges}
        for kind in self.kinds:
            encode = encoders[kind]
            assert encode is not None
            ids, owner = known.get(kind) or encode(texts)
            ones, twos, pairs = ngrams(ids, owner, _SALTS[kind])
            for grams, of in ((ones, owner), (twos, pairs)):
                yield (grams % np.uint64(self.buckets)).view(np.int64), of

    @functools.cached_property
    def _subwords(self) -> Encoder | None:
        return None if self.subword is None else encoder(self.subword)

    @functools.cached_property
    def _merges(self) -> Encoder | None:
        return None if self.pieces is None else Merges(self.pieces)


def mix(x: Array) -> Array:
    """A 64-bit finalizer (splitmix64's): every input bit moves every output bit."""
    mixed = np.array(x)
    spare = np.empty_like(mixed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        np.right_shift(mixed, np.uint64(shift), out=spare)
        np.bitwise_xor(mixed, spare, out=mixed)
        if factor > 1:
            np.multiply(mixed, np.uint64(factor), out=mixed)
    return mixed


def ngrams(ids: Array, owner: Array, salt: np.uint64) -> tuple[Array, Array, Array]:
    """Hashes of single tokens [n], of pairs within a text [p], and the pairs' texts [p]."""
    with np.errstate(over="ignore"):
        ones = mix(ids + salt * _GOLDEN)
        inside = np.flatnonzero(owner[1:] == owner[:-1])
        twos = mix(ones[inside] * _GOLDEN + ones[inside + 1])
    return ones, twos, owner[inside]


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
    held = kinds != 0
    inside = data[held]
    hashes = polynomial(inside, np.cumsum(held)[starts] - 1)
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
    hashes, of = twos, pairs
    if keep.any():
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
