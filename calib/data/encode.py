"""Texts to token ids, exactly those of the Rust tokenizers but several times faster: what repeats is tokenized once.

A byte-pair merge never crosses a place that no entry of the vocabulary crosses; nor does any other model here. So
where a tokenizer's patterns cut before spaces as well, a text's ids are those of its stretches, one after another.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Array = NDArray[Any]
Encoder = Callable[[Sequence[str]], tuple[Array, Array]]  # texts to ids uint64 [n] and each id's text, int64 [n]

_PRIME = np.uint64(0x100000001B3)
_KEPT = 1 << 19  # stretches remembered at once, about 25 bytes each
_ACROSS = re.compile(r"[^\s▁Ā-Ġ][ Ġ▁]")  # a space, as vocabularies write it, after what is none; Ā-Ġ: bytes 0 to 32
_PROBES = ("a", "S", "'", "1", ".", "\n", "_", "é", "\u00a0", "漢", "\u0301")  # one of each class that patterns know


def encoder(tokenizer: Tokenizer) -> Encoder:
    """The fastest way to a tokenizer's ids that is known to be exact."""
    return Stretches(tokenizer) if cuts_at_spaces(tokenizer) else lambda texts: encoded(tokenizer, texts)


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Array, Array]:
    """Token ids of whole texts, without special tokens, and the text each belongs to."""
    rows = [row.ids for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    lengths = [len(row) for row in rows]
    ids = np.fromiter(itertools.chain.from_iterable(rows), np.uint64, sum(lengths))
    return ids, np.repeat(np.arange(len(rows)), lengths)


def cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its stretches.

    No entry of the vocabulary, and no added token, may reach beyond a space that follows something else; and texts
    of every class of character on both sides of a space come out the same.
    """
    if any(map(_ACROSS.search, tokenizer.get_vocab())):
        return False
    if any(token["rstrip"] for token in json.loads(tokenizer.to_str())["added_tokens"]):
        return False
    after = (*_PROBES, " ")
    texts = [left + " " + a + b for left in _PROBES for a in after for b in after]
    texts += [a + b + " " + right for a in _PROBES for b in _PROBES for right in after]
    pairs = zip(encoded(tokenizer, texts), Stretches(tokenizer)(texts), strict=True)
    return all(np.array_equal(whole, cut) for whole, cut in pairs)


class Stretches:
    """The ids of texts cut before each space that follows something else, with a memory of the stretches.

    Constant memory: all is forgotten once `_KEPT` of them, or four times as many ids, are held.
    """

    _hashes: Array  # uint64, sorted; of each stretch
    _places: Array  # int64: where its ids start
    _counts: Array  # int64: how many there are
    _ids: Array  # uint32

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._forget()

    def __call__(self, texts: Sequence[str]) -> tuple[Array, Array]:
        data, starts, owner = _stretches(texts)
        if not len(starts):
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        hashes = polynomial(data, starts)
        where = np.searchsorted(self._hashes, hashes)
        new = np.flatnonzero(self._hashes[np.minimum(where, len(self._hashes) - 1)] != hashes)
        if len(new):
            self._learn(data, np.append(starts, len(data)), new, hashes[new])
            where = np.searchsorted(self._hashes, hashes)
        counts = self._counts[where]
        ends = np.cumsum(counts)
        # where each id lies: its stretch's first place, and on from there
        ids = self._ids[np.arange(ends[-1]) + np.repeat(self._places[where] - ends + counts, counts)]
        if len(self._hashes) > _KEPT or len(self._ids) > 4 * _KEPT:
            self._forget()
        return ids.astype(np.uint64), np.repeat(owner, counts)

    def _learn(self, data: Array, edges: Array, new: Array, hashes: Array) -> None:
        hashes, first = np.unique(hashes, return_index=True)
        parts = [bytes(data[edges[i] : edges[i + 1]]).decode() for i in new[first]]
        ids, of = encoded(self.tokenizer, parts)
        counts = np.bincount(of, minlength=len(parts))
        places = len(self._ids) + np.cumsum(counts) - counts
        at = np.searchsorted(self._hashes, hashes)
        self._ids = np.concatenate([self._ids, ids.astype(np.uint32)])
        self._hashes = np.insert(self._hashes, at, hashes)
        self._places, self._counts = np.insert(self._places, at, places), np.insert(self._counts, at, counts)

    def _forget(self) -> None:
        self._hashes = np.array([2**64 - 1], np.uint64)  # of nothing: a table is never empty
        self._ids = np.empty(0, np.uint32)
        self._places, self._counts = np.zeros(1, np.int64), np.zeros(1, np.int64)


def _stretches(texts: Sequence[str]) -> tuple[Array, Array, Array]:
    """The bytes of all texts, where each stretch starts, and the text it belongs to."""
    raw = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(raw), np.uint8)
    lengths = np.array([len(each) for each in raw])
    begins = np.cumsum(lengths) - lengths
    cut = np.zeros(len(data), bool)
    cut[1:] = (data[1:] == ord(" ")) & _ENDS[data[:-1]]
    cut[begins[lengths > 0]] = True
    starts = np.flatnonzero(cut)
    return data, starts, np.searchsorted(begins + lengths, starts, side="right")


def _last_bytes() -> Array:
    """Bytes that end no white space: neither ASCII's nor any of Unicode's."""
    ends = np.ones(256, bool)
    ends[[*range(33), 127, *range(0x80, 0x8F), 0x9F, 0xA0, 0xA8, 0xA9, 0xAF]] = False
    return ends


_ENDS = _last_bytes()


def polynomial(data: Array, starts: Array) -> Array:
    """Of each stretch of bytes its hash sum_j (byte_j + 1) prime^j mod 2^64."""
    lengths = np.diff(starts, append=len(data))
    place = np.arange(len(data)) - np.repeat(starts, lengths)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.concatenate(([np.uint64(1)], np.full(int(lengths.max()), _PRIME))), dtype=np.uint64)
        values = powers[place]
        values *= data + np.uint64(1)
        return np.add.reduceat(values, starts)


class Merges:
    """The ids of a byte-level BPE that cuts after marks, for one that learned so: no entry runs on after a mark.

    The cut, which takes most of its time, is left out, and whole texts merge to the same ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = Tokenizer(tokenizer.model)

    def __call__(self, texts: Sequence[str]) -> tuple[Array, Array]:
        raw = [text.encode() for text in texts]
        mapped = _LETTERS[np.frombuffer(b"".join(raw), np.uint8)].tobytes().decode("utf-32-le")
        edges = [0, *itertools.accumulate(map(len, raw))]
        return encoded(self.tokenizer, [mapped[a:b] for a, b in itertools.pairwise(edges)])


def _byte_letters() -> Array:
    """The letter, code point as little-endian uint32, by which byte-level tokenizers write each byte (GPT-2's)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = np.arange(256, dtype="<u4")
    letters[others] = 256 + np.arange(len(others))
    return letters


_LETTERS = _byte_letters()
