"""Quantiles of magnitudes over any amount of data, from a histogram of floats' leading bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.observers.base import Observer, block_rows
from calib.observers.ranks import summed

SHIFT = 17  # keeps the exponent and six bits of the mantissa: 64 bins an octave
BINS = 1 << (31 - SHIFT)
MAGNITUDE = 0x7FFFFFFF
ENOUGH = 1 << 15  # elements of a batch: more would only cost time


class Quantile(Observer):
    """Quantiles of |x| over all elements, to 0.8 % of the value; counts are int64 and merge exactly."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self._bits = torch.empty(0, dtype=torch.int32)

    def update(self, rows: Tensor) -> None:
        rows = rows.detach().reshape(-1, rows.shape[-1])  # a view: subsets keep the stride between rows
        for block in rows.split(block_rows(rows.shape[1], rows.device)):
            if self._bits.numel() < block.numel() or self._bits.device != rows.device:
                self._bits = torch.empty(block.numel(), dtype=torch.int32, device=rows.device)
            bits = self._bits[: block.numel()].view(block.shape)
            if block.dtype == torch.float32:
                torch.bitwise_and(block.view(torch.int32), MAGNITUDE, out=bits)
            else:
                bits.view(torch.float32).copy_(block)
                bits.bitwise_and_(MAGNITUDE)
            bits.bitwise_right_shift_(SHIFT)  # NaN and inf come last; Range tells of them
            self.counts += torch.bincount(bits.view(-1), minlength=BINS).to(self.counts.device)

    def quantile(self, q: float) -> float:
        """The magnitude below which a share q of the elements lies; 0.0 where nothing was seen."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        index = int(torch.searchsorted(self.counts.cumsum(0), max(1, round(q * total))))
        if index == 0:
            return 0.0
        edges = torch.tensor([index << SHIFT, (index + 1) << SHIFT], dtype=torch.int32).view(torch.float32)
        return float(edges.double().mean())

    def merge(self, other: Observer) -> None:
        assert isinstance(other, Quantile)
        self.counts = self.counts + other.counts

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        self.counts = summed(self.counts, group)

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts = state["counts"]
