"""A bounded uniform sample of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.observers.base import Observer


class RowSample(Observer):
    """At most ``capacity`` rows [<= capacity, n] fp32, uniform without replacement over all rows seen.

    Every row draws a priority; the highest stay, so two samples merge by taking the highest of both. Give each process
    a seed of its own.
    """

    def __init__(self, features: int, capacity: int = 2048, seed: int = 0) -> None:
        self.capacity = capacity
        self.rows = torch.empty(0, features)
        self.priority = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, rows: Tensor) -> None:
        priority = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        if len(self.priority) == self.capacity:  # most rows lose at once: do not copy them
            keep = priority > self.priority.min()
            rows, priority = rows[keep.to(rows.device)], priority[keep]
        self._take(rows.float(), priority)

    def _take(self, rows: Tensor, priority: Tensor) -> None:
        rows = torch.cat([self.rows.to(rows.device), rows])
        priority = torch.cat([self.priority, priority])
        if len(priority) > self.capacity:
            top = priority.topk(self.capacity).indices.sort().values
            rows, priority = rows[top.to(rows.device)], priority[top]
        self.rows, self.priority = rows, priority

    def merge(self, other: Observer) -> None:
        assert isinstance(other, RowSample)
        self._take(other.rows, other.priority)

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "priority": self.priority}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rows, self.priority = state["rows"], state["priority"]
