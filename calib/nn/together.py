"""Layers that take the same input on the same grid (q, k, v; gate, up): one quantization and one product for all.

Nobody lists them: a layer that finds the codes of its input just made by another is remembered there as its follower,
and where that pays the next call of the first computes for all. A result that nobody fetches costs time, never truth,
and layers whose results are left lying are parted again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib.nn.codes import Codes, Quantize

MOST = 8  # followers of one layer
PATIENCE = 32  # calls in which a layer looks for its first follower; looking costs some microseconds
FEW = 64  # rows: beyond, the product takes so long that starting it once for all saves nothing
FEW_VALUES = 1 << 13  # of an input
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = 1 << 20  # weights of all layers: the same, and they are held packed once more

Product = Callable[[Codes], Tensor]  # codes of x [M, in] -> fp32 [M, out]
Finish = Callable[[Codes, Tensor], Tensor]  # codes and their product -> the layer's own fp32 [M, out]


class Reader:
    """A layer as the taker of an input; it stays alone where its class has no ``joined``.

    key: fingerprint of its quantizer; quantize: rows to codes; shape: out, in; finish: what follows the product.
    kind: what layers need in common to be joined. single: whether one row runs alone.
    """

    key: bytes
    quantize: Quantize
    product: Product
    finish: Finish | None
    shape: tuple[int, int]
    kind: tuple[object, ...] = ()
    single = False
    joined: Callable[[Sequence[Any]], Product] | None = None

    def __init__(self) -> None:
        self.followers: list[weakref.ref[Reader]] = []
        self.leader: weakref.ref[Reader] | None = None
        self.patience = PATIENCE
        self._joint: _Joint | None = None
        self._left: dict[Reader, Tensor] = {}  # of the last joint product
        self._used = self._wasted = 0

    def followed_by(self, other: Reader) -> None:
        if other is not self and len(self.followers) < MOST and all(each() is not other for each in self.followers):
            self.followers = [*self.followers, weakref.ref(other)]
            other.leader = weakref.ref(self)

    def compute(self, codes: Codes) -> tuple[Tensor, dict[Reader, Tensor]]:
        """The product, and what followers will ask for."""
        joint = self._joint
        followers = self.followers
        if joint is None or joint.followers is not followers:
            joint = self._joint = self._of(followers)
        rows = codes.rows
        if self.joined is None or rows > joint.few or (rows == 1 and self.single):
            return self.product(codes), {}
        others = [reader for each in joint.others if (reader := each()) is not None]
        if len(others) < len(joint.others):  # one has been packed anew
            self.followers = [each for each in self.followers if each() is not None]
            return self.product(codes), {}
        if self._wasted > self._used + 3:  # they go different ways
            return self.product(codes), {}
        if self._left:
            self._wasted += 1
        else:
            self._used += 1
        if joint.product is None:
            with _joining:  # layers may be joined by two threads, or into two groups
                joint.product = joint.product or self.joined(others)
        y = joint.product(codes)
        own, *rest = _split(y, joint.widths, 1)  # contiguous, as of layers that run alone
        results = self._left = dict(zip(others, rest, strict=True))  # another thread may set its own meanwhile
        return own, results

    def _of(self, followers: list[weakref.ref[Reader]]) -> _Joint:
        alive = [(each, reader) for each in followers if (reader := each()) is not None]
        alike = [(each, reader) for each, reader in alive if reader.kind == self.kind]
        widths = [self.shape[0], *(reader.shape[0] for _, reader in alike)]
        few = FEW if alike and sum(widths) * self.shape[1] <= SMALL else 0
        return _Joint(followers, [each for each, _ in alike], widths, few)


_joining = threading.Lock()
_split = torch.ops.aten.split_with_sizes_copy.default


@dataclass(slots=True)
class _Joint:
    """A reader and those of its followers that run with it, for up to ``few`` rows."""

    followers: list[weakref.ref[Reader]]
    others: list[weakref.ref[Reader]]
    widths: list[int]
    few: int
    product: Product | None = None


@dataclass(slots=True)
class _Kept:
    """The last codes a thread made. The input is not kept alive by them, nor they beyond it.

    version: of the input, None where it cannot tell (made in inference mode); then copy is what it was, where there are
    followers to profit from it.
    """

    of: weakref.ref[Tensor]
    version: int | None
    copy: Tensor | None
    reader: Reader
    codes: Codes
    results: dict[Reader, Tensor]

    def still(self, x: Tensor) -> bool:
        """Whether x is what it was."""
        if self.version is not None:
            return self.version == x._version
        return self.copy is not None and _equal(self.copy, x)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit. Beyond a few rows torch's own answer takes five times as long as numpy's."""
    if a.numel() < FEW_VALUES or a.device.type != "cpu":
        return torch.equal(a, b)
    word = WORDS[a.element_size()]
    return np.array_equal(a.view(word).numpy(), b.view(word).numpy())


_last = threading.local()


def read(reader: Reader, x: Tensor) -> tuple[Codes, Tensor]:
    """Codes of x [..., in], as rows, and the reader's fp32 [M, out].

    Both are taken from the call before where it had this very tensor, unchanged, and an equal quantizer.
    """
    kept: _Kept | None = getattr(_last, "kept", None)
    if kept is not None and kept.of() is x and kept.reader.key == reader.key:
        if kept.still(x):
            y = kept.results.pop(reader, None)
            if y is None:
                if reader.leader is None or reader.leader() is not kept.reader:
                    kept.reader.followed_by(reader)
                y = reader.product(kept.codes)
            return kept.codes, y if reader.finish is None else reader.finish(kept.codes, y)
        if kept.version is None and kept.copy is None:
            kept.reader.followed_by(reader)
    codes = reader.quantize(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    if reader.followers:
        y, results = reader.compute(codes)
    else:
        y, results = reader.product(codes), {}
    if reader.followers or reader.patience:
        reader.patience = max(reader.patience - 1, 0)
        version = None if x.is_inference() else x._version
        copy = x.clone() if version is None and reader.followers else None
        _last.kept = _Kept(weakref.ref(x, _forget), version, copy, reader, codes, results)
    return codes, y if reader.finish is None else reader.finish(codes, y)


def _forget(of: weakref.ref[Tensor]) -> None:
    kept: _Kept | None = getattr(_last, "kept", None)
    if kept is not None and kept.of is of:
        _last.kept = None
