"""A bounded uniform sample of rows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.observers.base import Observer, block_rows
from calib.observers.ranks import gathered, rank, summed

GOLDEN, FIRST, SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
STREAM = 40  # rows that nobody numbers are numbered from rank << 40: no two ranks draw the same number


def _mixed(z: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), a bijection of uint64."""
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))


def priorities(number: np.ndarray, seed: int) -> np.ndarray:
    """int64 [T], as good as random: a hash of (seed, row number); no two numbers of one seed share a priority."""
    start = _mixed(np.array([seed % 2**64], dtype=np.uint64))
    return _mixed((number.view(np.uint64) + start) * GOLDEN).view(np.int64)


@lru_cache(maxsize=2)
def _consecutive(first: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and priorities, not to be written to: all sites of a block ask for the same ones, batch after batch."""
    number = np.arange(first, first + count, dtype=np.int64)
    return number, priorities(number, seed)


class RowSample(Observer):
    """At most ``capacity`` rows [<= capacity, n] fp32, uniform without replacement over all rows seen.

    A row's priority is a hash of the seed and of its number in the whole data; the highest stay. So the sample is a
    function of the data and the seed alone: whatever process saw a row and in whatever order, observers of one seed
    merge to the same rows in the same order (that of their numbers), bit for bit. Rows of one number are one row.
    """

    def __init__(self, features: int, capacity: int = 2048, seed: int = 0) -> None:
        self.capacity, self.seed, self.seen = capacity, seed, 0
        # numpy keeps the books: between two GEMMs a handful of small torch calls costs more than all of it
        self._number = np.empty(0, dtype=np.int64)
        self._priority = np.empty(0, dtype=np.int64)
        self._buffer = torch.empty(0, features)  # the first len(self) rows are the sample's
        self._sorted = True

    def __len__(self) -> int:
        return len(self._number)

    @property
    def number(self) -> Tensor:
        """int64 [<= capacity], rising: which rows they are."""
        self._sort()
        return torch.from_numpy(self._number)

    @property
    def rows(self) -> Tensor:
        """The sample, ordered by row number."""
        self._sort()
        return self._buffer[: len(self)]

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self._sort()
        self._buffer = rows

    def update(self, rows: Tensor, first: int | Tensor | None = None) -> None:
        """Take rows [T, n]. first: the number of the first one in the whole data, or the numbers int64 [T] of all;
        None: they come after those seen so far by this observer (on this rank)."""
        count, held = rows.shape[0], len(self)
        if isinstance(first, Tensor):
            number = first.cpu().numpy()
            priority = priorities(number, self.seed)
        else:
            start = (rank() << STREAM) + self.seen if first is None else first
            number, priority = _consecutive(start, count, self.seed)
        self.seen += count
        lowest = self._priority.min() if held == self.capacity else np.int64(-(2**63))  # most rows lose at once
        index = np.flatnonzero(priority >= lowest)
        if not len(index):
            return
        number, priority = number[index], priority[index]
        place = np.arange(held, min(self.capacity, held + len(index)))
        if (over := held + len(index) - self.capacity) > 0:  # winners take the places of losers
            losers = np.argpartition(np.concatenate([self._priority, priority]), over - 1)[:over]
            wins = np.ones(len(index), dtype=bool)
            wins[losers[losers >= held] - held] = False
            index, number, priority = index[wins], number[wins], priority[wins]
            place = np.concatenate([place, losers[losers < held]])
        size = max(held, int(place.max(initial=-1)) + 1)
        if size > held:
            self._number, self._priority = np.resize(self._number, size), np.resize(self._priority, size)
        self._number[place], self._priority[place], self._sorted = number, priority, False
        self._place(torch.from_numpy(place), rows.detach(), torch.from_numpy(index))

    def _place(self, place: Tensor, rows: Tensor, index: Tensor) -> None:
        if len(self._buffer) < self.capacity or self._buffer.device != rows.device:  # pages are touched as they fill
            grown = torch.empty(self.capacity, rows.shape[1], device=rows.device)
            grown[: len(self._buffer)] = self._buffer
            self._buffer = grown
        step = block_rows(rows.shape[1], rows.device)
        for to, of in zip(place.to(rows.device).split(step), index.to(rows.device).split(step), strict=True):
            self._buffer.index_copy_(0, to, rows.index_select(0, of).float())

    def _sort(self) -> None:
        if not self._sorted:
            order = np.argsort(self._number, kind="stable")
            self._number, self._priority, self._sorted = self._number[order], self._priority[order], True
            self._buffer[: len(order)] = self._buffer[torch.from_numpy(order).to(self._buffer.device)]

    def _winners(self, number: np.ndarray, priority: np.ndarray) -> np.ndarray:
        """Which of the candidates stay, in the order of their numbers; of one number the first."""
        index = np.unique(number, return_index=True)[1]
        if (over := len(index) - self.capacity) > 0:
            index = np.delete(index, np.argpartition(priority[index], over - 1)[:over])
        return index

    def merge(self, other: Observer) -> None:
        assert isinstance(other, RowSample)
        rows = torch.cat([self.rows, other.rows.to(self._buffer.device)])
        number = np.concatenate([self._number, other._number])
        priority = np.concatenate([self._priority, other._priority])
        index = self._winners(number, priority)
        self._buffer = rows[torch.from_numpy(index).to(rows.device)]
        self._number, self._priority = number[index], priority[index]
        self.seen += other.seen

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        rows = self.rows
        sizes = gathered(torch.tensor([len(self), self.seen]), group)
        if len(sizes) == 1:
            return
        padded = torch.zeros(2, max(int(size) for size, _ in sizes), dtype=torch.int64)
        padded[:, : len(self)] = torch.from_numpy(np.stack([self._number, self._priority]))
        parts = [part[:, : int(size)] for part, (size, _) in zip(gathered(padded, group), sizes, strict=True)]
        number, priority = torch.cat(parts, 1).numpy()
        index = self._winners(number, priority)
        start = sum(part.shape[1] for part in parts[: rank(group)])
        mine = (index >= start) & (index < start + len(rows))
        # every winner has one owner, all others add the integer 0 to its bits: exact, and no rank holds all samples
        place, of = (torch.from_numpy(v).to(rows.device) for v in (np.flatnonzero(mine), index[mine] - start))
        bits = torch.zeros(len(index), rows.shape[1], dtype=torch.int32, device=rows.device)
        bits[place] = rows[of].view(torch.int32)
        self._buffer = summed(bits, group).view(torch.float32)
        self._number, self._priority = number[index], priority[index]
        self.seen = sum(int(seen) for _, seen in sizes)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"rows": self.rows, "number": self.number, "priority": torch.from_numpy(self._priority)}
        return {**state, "seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._buffer, self._number, self._priority = state["rows"], state["number"].numpy(), state["priority"].numpy()
        self.seen, self._sorted = int(state["seen"]), True
