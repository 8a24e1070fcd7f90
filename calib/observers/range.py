"""Per-channel extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.observers.base import Observer, block_rows
from calib.observers.ranks import gathered, total

VIEWS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
WORDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float32: (np.int32, np.uint32),
    torch.bfloat16: (np.int16, np.uint16),
    torch.float16: (np.int16, np.uint16),
}
WIDE = 8 << 10  # bytes of a row that numpy's loop likes
CACHED = 2 << 20  # bytes read twice at a time
INF, ZERO = np.float32(np.inf), np.float32(0)  # adding 0 makes -0 and 0 one


def _floats(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype == torch.bfloat16:
        return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view(np.float32 if dtype == torch.float32 else np.float16).astype(np.float32)


class _Words:
    """Extremes of floats read as integers, ``fold`` rows of n taken as one: narrow rows are short for numpy's loop.

    A float is a sign and a magnitude. Read as integers, the signed maximum of some floats is therefore the largest of
    them that is not negative, and the unsigned maximum the lowest of the negative ones. Integer maxima over rows run at
    the speed of memory, in half types too, with nothing but one row to write. Only a channel of one sign needs a third:
    the signed minimum is its value nearest to zero. NaN is the largest magnitude.
    """

    def __init__(self, n: int, dtype: torch.dtype, fold: int) -> None:
        self.n, self.dtype = n, dtype
        word, self.unsigned = WORDS[dtype]
        self.word, limits = np.dtype(word), np.iinfo(word)
        self.top = np.full(fold * n, limits.min, word)
        self.deep = np.zeros(fold * n, self.unsigned)
        self.near = np.full(fold * n, limits.max, word)
        self.open = True  # a channel may still be of one sign

    def take(self, signed: np.ndarray) -> None:
        """signed [rows, fold * n]."""
        plain = signed.view(self.unsigned)
        step = max(1, CACHED // signed[0].nbytes)
        for start in range(0, len(signed), step):  # blocks stay in cache for the second pass
            block = slice(start, start + step)
            np.maximum(self.top, np.maximum.reduce(signed[block], axis=0), out=self.top)
            np.maximum(self.deep, np.maximum.reduce(plain[block], axis=0), out=self.deep)
            if self.open:
                np.minimum(self.near, np.minimum.reduce(signed[block], axis=0), out=self.near)
                self.open = bool(self._one_sign().any())

    def _one_sign(self) -> np.ndarray:
        return (self.top < 0) | (self.deep.view(self.word) >= 0)

    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """lowest and highest of each channel, fp32 [n]."""
        low, one_sign = self.deep.view(self.word), self._one_sign()
        highest, lowest, nearest = (_floats(each, self.dtype) for each in (self.top, low, self.near))
        hi = np.where(self.top >= 0, highest, np.where(one_sign, nearest, -INF)).reshape(-1, self.n).max(0)
        lo = np.where(low < 0, lowest, np.where(one_sign, nearest, INF)).reshape(-1, self.n).min(0)
        if (lost := np.isnan(lo) | np.isnan(hi)).any():
            hi[lost] = lo[lost] = np.nan
        return lo + ZERO, hi + ZERO


class Range(Observer):
    """Running min and max of n channels, fp32; neither order nor merging nor processes change a bit of it."""

    def __init__(self, features: int) -> None:
        self._lo = torch.full((features,), torch.inf)
        self._hi = torch.full((features,), -torch.inf)
        self._words: dict[tuple[torch.dtype, int], _Words] = {}  # what is seen, but not yet in lo and hi
        self.count = 0

    @property
    def lo(self) -> Tensor:
        """Lowest of each channel so far, fp32 [n]; inf before the first row."""
        self._settle()
        return self._lo

    @lo.setter
    def lo(self, value: Tensor) -> None:
        self._settle()
        self._lo = value

    @property
    def hi(self) -> Tensor:
        """Highest of each channel so far, fp32 [n]; -inf before the first row."""
        self._settle()
        return self._hi

    @hi.setter
    def hi(self, value: Tensor) -> None:
        self._settle()
        self._hi = value

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(-self.lo, self.hi)

    def update(self, rows: Tensor) -> None:
        self.count += rows.shape[0]
        if not rows.numel():
            return
        rows = rows.detach()
        if rows.device.type == "cpu" and rows.dtype in WORDS:
            self._scan(rows)
            return
        self._lo, self._hi = self._lo.to(rows.device), self._hi.to(rows.device)
        for block in rows.split(block_rows(rows.shape[1], rows.device)):
            block = block.float()
            self._take(block.amin(0), block.amax(0))

    def _scan(self, rows: Tensor) -> None:
        n = rows.shape[1]
        signed = rows.view(VIEWS[rows.dtype]).numpy()
        fold = max(1, WIDE // (signed.itemsize * n)) if signed.flags.c_contiguous else 1
        whole = len(signed) // fold * fold
        if whole:
            self._of(rows.dtype, fold).take(signed[:whole].reshape(-1, fold * n))
        if whole < len(signed):
            self._of(rows.dtype, 1).take(signed[whole:])

    def _of(self, dtype: torch.dtype, fold: int) -> _Words:
        if (dtype, fold) not in self._words:
            self._words[dtype, fold] = _Words(len(self._lo), dtype, fold)
        return self._words[dtype, fold]

    def _settle(self) -> None:
        """Bring what was scanned into lo and hi: integers are decoded when asked for, not with every batch."""
        seen, self._words = self._words, {}
        for words in seen.values():
            lo, hi = (torch.from_numpy(each).to(self._lo.device) for each in words.extremes())
            self._take(lo, hi)

    def _take(self, lo: Tensor, hi: Tensor) -> None:
        # minimum and maximum carry NaN on, so a single one is seen at the end
        torch.minimum(self._lo, lo + 0.0, out=self._lo)
        torch.maximum(self._hi, hi + 0.0, out=self._hi)

    def merge(self, other: Observer) -> None:
        assert isinstance(other, Range)
        self._take(other.lo, other.hi)
        self.count += other.count

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        # gathered, not reduced: a backend's own minimum may lose a NaN
        for lo, hi in gathered(torch.stack([self.lo, self.hi]), group):
            self._take(lo, hi)
        (self.count,) = total([self.count], group)

    def state_dict(self) -> dict[str, Tensor]:
        return {"lo": self.lo, "hi": self.hi, "count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.lo, self.hi, self.count = state["lo"], state["hi"], int(state["count"])
