"""Per-channel extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.observers.base import BLOCK, Observer, block_rows
from calib.observers.ranks import gathered, total

WORDS = {
    torch.float32: (torch.int32, np.uint32),
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
}
WIDE = 5 << 10  # bytes of a row that numpy's loop likes
INF, ZERO = np.float32(np.inf), np.float32(0)  # adding 0 makes -0 and 0 one


def _floats(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype == torch.bfloat16:
        return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view(np.float32 if dtype == torch.float32 else np.float16).astype(np.float32)


def _scan(signed: np.ndarray, unsigned: Any, one_sign: np.ndarray, step: int) -> tuple[np.ndarray, ...]:
    """[n] each: signed and unsigned maxima over rows, and signed minima where ``one_sign`` (updated) stays true."""
    plain = signed.view(unsigned)
    top, deep, near = signed[0].copy(), plain[0].copy(), signed[0].copy()
    open_ = bool(one_sign.any())
    for start in range(0, len(signed), step):  # blocks stay in cache for the second pass
        block = slice(start, start + step)
        np.maximum(top, np.maximum.reduce(signed[block], axis=0), out=top)
        np.maximum(deep, np.maximum.reduce(plain[block], axis=0), out=deep)
        if open_:
            one_sign &= (top < 0) | (deep.view(signed.dtype) >= 0)
            if open_ := bool(one_sign.any()):
                np.minimum(near, np.minimum.reduce(signed[block], axis=0), out=near)
    return top, deep, near


def _scan_folded(signed: np.ndarray, unsigned: Any, one_sign: np.ndarray, step: int) -> tuple[np.ndarray, ...]:
    """``_scan`` of narrow rows, several taken as one: a row of half types is short for numpy's loop."""
    rows, n = signed.shape
    fold = max(1, WIDE // (signed.itemsize * n)) if signed.flags.c_contiguous else 1
    whole = rows // fold * fold
    if fold == 1 or not whole:
        return _scan(signed, unsigned, one_sign, step)
    wide = np.tile(one_sign, fold)
    parts = [
        [x.reshape(fold, n) for x in _scan(signed[:whole].reshape(-1, fold * n), unsigned, wide, max(1, step // fold))]
    ]
    one_sign &= wide.reshape(fold, n).all(0)
    if whole < rows:
        parts.append([x[None] for x in _scan(signed[whole:], unsigned, one_sign, step)])
    tops, deeps, nears = (np.concatenate(of) for of in zip(*parts, strict=True))
    return tops.max(0), deeps.max(0), nears.min(0)


class Range(Observer):
    """Running min and max of n channels, fp32; neither order nor merging nor processes change a bit of it."""

    def __init__(self, features: int) -> None:
        self.lo = torch.full((features,), torch.inf)
        self.hi = torch.full((features,), -torch.inf)
        self.count = 0

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(-self.lo, self.hi)

    def update(self, rows: Tensor) -> None:
        self.count += rows.shape[0]
        self.lo, self.hi = self.lo.to(rows.device), self.hi.to(rows.device)
        if not rows.numel():
            return
        if rows.device.type == "cpu" and rows.dtype in WORDS:
            lo, hi = self._extremes(rows.detach())
            np.minimum(self.lo.numpy(), lo, out=self.lo.numpy())
            np.maximum(self.hi.numpy(), hi, out=self.hi.numpy())
            return
        for block in rows.detach().split(block_rows(rows.shape[1], rows.device)):
            block = block.float()
            self._take(block.amin(0), block.amax(0))

    def _extremes(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(lo, hi) [n] of rows [T, n], as far as they can move the running ones.

        A float is a sign and a magnitude. Read as integers, the signed maximum of some floats is therefore the largest
        of them that is not negative, and the unsigned maximum the lowest of the negative ones. Integer maxima over
        rows run at the speed of memory, in half types too, with nothing but [n] values to write. Only a channel of
        one sign needs a third: the signed minimum is its value nearest to zero. NaN is the largest magnitude.
        """
        word, unsigned = WORDS[rows.dtype]
        signed = rows.view(word).numpy()
        step = max(1, 4 * BLOCK // (rows.itemsize * rows.shape[1]))
        one_sign = (self.lo.numpy() > 0) | (self.hi.numpy() < 0)  # so far; of the others only new extremes matter
        top, deep, near = _scan_folded(signed, unsigned, one_sign, step)
        low = deep.view(top.dtype)
        hi = np.where(top >= 0, _floats(top, rows.dtype), -INF)
        lo = np.where(low < 0, _floats(low, rows.dtype), INF)
        if one_sign.any():
            nearest = _floats(near, rows.dtype)
            hi, lo = np.where(one_sign & (top < 0), nearest, hi), np.where(one_sign & (low >= 0), nearest, lo)
        if (lost := np.isnan(lo) | np.isnan(hi)).any():
            hi[lost] = lo[lost] = np.nan
        return lo + ZERO, hi + ZERO

    def _take(self, lo: Tensor, hi: Tensor) -> None:
        # minimum and maximum carry NaN on, so a single one is seen at the end
        torch.minimum(self.lo, lo + 0.0, out=self.lo)
        torch.maximum(self.hi, hi + 0.0, out=self.hi)

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
