"""First and second moments: mean, E[x^2] and, where asked, the Gram matrix X^T X."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.observers.base import Observer, block_rows
from calib.observers.ranks import summed, total

GRAM_ROWS = 4096  # one GEMM takes at most these
HELD_ROWS = 512  # fewer rows, or of another dtype, gather first: a GEMM of few rows costs as much memory traffic
SUM_ROWS, SUM_BLOCKS = 512, 64  # so many blocks, then the rows of one, are added in fp32; fp64 takes the rest


class Moments(Observer):
    """Sums over T rows of n channels: ``total`` [n] and ``square`` [n] in fp64, ``gram`` [n, n].

    Products and the Gram's sums are fp32, or fp64 with ``double``. Only the Gram's upper triangle is summed, in
    stripes; it is mirrored when read.
    """

    def __init__(self, features: int, gram: bool = False, double: bool = False) -> None:
        self.count = 0
        self._total = torch.zeros(features, dtype=torch.float64)
        self._square = torch.zeros(features, dtype=torch.float64)
        self._dtype = torch.float64 if double else torch.float32
        self._gram = torch.zeros(features, features, dtype=self._dtype) if gram else None
        self._mirrored = True
        self._held = self._work = torch.empty(0, features, dtype=self._dtype)
        self._holds = self._adds = 0

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        return self.square / max(self.count, 1)

    @property
    def total(self) -> Tensor:
        self._settle()
        return self._total

    @property
    def square(self) -> Tensor:
        self._settle()
        self._flush()
        return self._square if self._gram is None else self._gram.diagonal().to(torch.float64, copy=True)

    @property
    def gram(self) -> Tensor | None:
        self._flush()
        if self._gram is not None and not self._mirrored:
            for a, b in self._stripes():
                tile = self._gram[a:b, a:b]
                tile.copy_(tile.triu() + tile.triu(1).T)
                self._gram[b:, a:b] = self._gram[a:b, b:].T
            self._mirrored = True
        return self._gram

    def update(self, rows: Tensor) -> None:
        rows, device = rows.detach(), rows.device
        self.count += rows.shape[0]
        if self._total.device != device:
            self._settle()
            self._flush()
            self._total, self._square = self._total.to(device), self._square.to(device)
            self._gram = None if self._gram is None else self._gram.to(device)
            self._held = self._work = self._held[:0].to(device)
        self._sum(rows)
        if self._gram is None:
            return
        if rows.dtype == self._dtype and rows.stride(1) == 1 and rows.shape[0] >= HELD_ROWS:
            for block in rows.split(GRAM_ROWS):
                self._multiply(block)
        else:
            self._hold(rows)

    def _sum(self, rows: Tensor) -> None:
        """Add block upon block, elementwise: rows are read once, all else stays in cache."""
        n = rows.shape[1]
        step = min(SUM_ROWS, block_rows(n, rows.device))
        if not len(self._work):
            self._work = torch.zeros(3, step, n, dtype=self._dtype, device=rows.device)
        for block in rows.split(step):
            work, total, square = self._work if len(block) == step else self._work[:, : len(block)]
            if block.dtype != self._dtype:
                block = work.copy_(block)
            total.add_(block)
            if self._gram is None:
                square.addcmul_(block, block)
            self._adds += 1
            if self._adds == SUM_BLOCKS:
                self._settle()

    def _settle(self) -> None:
        """Bring the fp64 sums up to date."""
        if self._adds:
            self._total += self._work[1].sum(0)
            self._square += self._work[2].sum(0)
            self._work.zero_()
            self._adds = 0

    def _hold(self, rows: Tensor) -> None:
        """Gather rows for one GEMM, in a buffer no larger than the Gram."""
        if not len(self._held):
            self._held = self._held.new_empty(min(HELD_ROWS, max(64, rows.shape[1])), rows.shape[1])
        while len(rows):
            taken = rows[: len(self._held) - self._holds]
            self._held[self._holds : self._holds + len(taken)] = taken
            self._holds += len(taken)
            rows = rows[len(taken) :]
            if self._holds == len(self._held):
                self._flush()

    def _flush(self) -> None:
        if self._holds:
            held, self._holds = self._held[: self._holds], 0
            self._multiply(held)

    def _stripes(self) -> list[tuple[int, int]]:
        n = len(self._total)
        step = (128 if n < 1024 else 256) if self._total.device.type == "cpu" else 2048
        return [(a, min(a + step, n)) for a in range(0, n, step)]

    def _multiply(self, block: Tensor) -> None:
        assert self._gram is not None
        for a, b in self._stripes():
            self._gram[a:b, a:].addmm_(block[:, a:b].T, block[:, a:])
        self._mirrored = False

    def transform(self, shift: Tensor | None, scale: Tensor | None) -> None:
        """Become the moments of (x - shift) / scale: sums are moved algebraically, the data are not read again."""
        gram, total, square = self.gram, self.total, self.square
        if shift is not None:
            z = shift.double()
            if gram is not None:
                cross = torch.outer(z, total)
                moved = gram.double() - cross - cross.T + self.count * torch.outer(z, z)
                gram = moved.to(gram.dtype)
            square = square - 2 * z * total + self.count * z.square()
            total = total - self.count * z
        if scale is not None:
            s = scale.double()
            if gram is not None:
                gram = (gram.double() / torch.outer(s, s)).to(gram.dtype)
            square, total = square / s.square(), total / s
        self._gram, self._total, self._square = gram, total, square

    def rotate(self, rotation: Callable[[Tensor], Tensor]) -> None:
        """Become the moments of rotation(x), an orthonormal map of rows; ``square`` needs the Gram for that."""
        self._total = rotation(self.total[None].float())[0].double()
        gram = self.gram
        if gram is not None:
            self._gram = rotation(rotation(gram).T.contiguous()).T.contiguous()
        else:  # without it, what the rotation spreads evenly is all that is known: the mean energy
            self._square = torch.full_like(self._square, float(self.square.mean()))

    def merge(self, other: Observer) -> None:
        assert isinstance(other, Moments)
        mine, others = self.gram, other.gram
        self._square = self.square + other.square
        if mine is not None and others is not None:
            self._gram = mine + others
        self.count += other.count
        self._total = self.total + other.total

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        self._square = self.square
        (self.count,) = total([self.count], group)
        self._total, self._square = (v.clone() for v in summed(torch.stack([self.total, self._square]), group))
        if self._gram is not None:
            self._gram = summed(self._gram, group)  # its lower triangle is mirrored when read

    def state_dict(self) -> dict[str, Tensor]:
        gram = self.gram
        state = {"count": torch.tensor(self.count), "total": self.total, "square": self.square}
        return state if gram is None else {**state, "gram": gram}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count, self._total, self._square = int(state["count"]), state["total"], state["square"]
        self._gram, self._mirrored, self._holds, self._adds = state.get("gram"), True, 0, 0
        self._work = self._work[:0]
