"""Quantiles of magnitudes over any amount of data, from a histogram on a logarithmic scale."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.observers.base import Observer

OCTAVES, PER_OCTAVE = 60, 32  # 2^-30 .. 2^30 in steps of 2.2 %


class Quantile(Observer):
    """Quantiles of |x| over all elements, to 1.1 % of the value; counts are int64 and merge exactly."""

    def __init__(self) -> None:
        self.counts = torch.zeros(OCTAVES * PER_OCTAVE, dtype=torch.int64)

    def update(self, rows: Tensor) -> None:
        magnitude = rows.detach().float().abs().flatten()
        magnitude.nan_to_num_(nan=torch.finfo(torch.float32).max)  # the top bin: Range tells of NaN and inf
        index = torch.log2(magnitude.clamp_(2.0 ** -(OCTAVES // 2))).add_(OCTAVES // 2).mul_(PER_OCTAVE).long()
        self.counts += torch.bincount(index.clamp_(max=len(self.counts) - 1), minlength=len(self.counts)).cpu()

    def quantile(self, q: float) -> float:
        """The magnitude below which a share q of the elements lies; 0.0 where nothing was seen."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        index = int(torch.searchsorted(self.counts.cumsum(0), max(1, round(q * total))))
        return float(2.0 ** ((index + 0.5) / PER_OCTAVE - OCTAVES // 2)) if index else 0.0

    def merge(self, other: Observer) -> None:
        assert isinstance(other, Quantile)
        self.counts = self.counts + other.counts

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts = state["counts"]
