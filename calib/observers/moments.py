"""First and second moments: mean, E[x^2] and, where asked, the Gram matrix X^T X."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calib.observers.base import Observer

GRAM_ROWS = 4096


class Moments(Observer):
    """Sums over T rows of n channels: ``total`` [n] and ``square`` [n] in fp64, ``gram`` [n, n].

    The Gram's products are fp32 GEMMs over up to 4,096 rows, summed in fp32, or in fp64 with ``double``.
    """

    def __init__(self, features: int, gram: bool = False, double: bool = False) -> None:
        self.count = 0
        self.total = torch.zeros(features, dtype=torch.float64)
        self.square = torch.zeros(features, dtype=torch.float64)
        dtype = torch.float64 if double else torch.float32
        self.gram = torch.zeros(features, features, dtype=dtype) if gram else None

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        return self.square / max(self.count, 1)

    def update(self, rows: Tensor) -> None:
        rows = rows.float()
        self.count += rows.shape[0]
        for name in ("total", "square") + (("gram",) if self.gram is not None else ()):
            setattr(self, name, getattr(self, name).to(rows.device))
        for start in range(0, rows.shape[0], GRAM_ROWS):
            block = rows[start : start + GRAM_ROWS]
            self.total += block.sum(0, dtype=torch.float32)
            if self.gram is None:
                self.square += torch.einsum("tj,tj->j", block, block)
            elif self.gram.dtype == torch.float32:
                self.gram.addmm_(block.T, block)
            else:
                self.gram += block.T @ block
        if self.gram is not None:
            self.square = self.gram.diagonal().double().clone()

    def transform(self, shift: Tensor | None, scale: Tensor | None) -> None:
        """Become the moments of (x - shift) / scale: sums are moved algebraically, the data are not read again."""
        if shift is not None:
            z = shift.double()
            if self.gram is not None:
                cross = torch.outer(z, self.total)
                moved = self.gram.double() - cross - cross.T + self.count * torch.outer(z, z)
                self.gram = moved.to(self.gram.dtype)
            self.square = self.square - 2 * z * self.total + self.count * z.square()
            self.total = self.total - self.count * z
        if scale is not None:
            s = scale.double()
            if self.gram is not None:
                self.gram = (self.gram.double() / torch.outer(s, s)).to(self.gram.dtype)
            self.square, self.total = self.square / s.square(), self.total / s

    def rotate(self, rotation: Callable[[Tensor], Tensor]) -> None:
        """Become the moments of rotation(x), an orthonormal map of rows; ``square`` needs the Gram for that."""
        self.total = rotation(self.total[None].float())[0].double()
        if self.gram is not None:
            self.gram = rotation(rotation(self.gram).T.contiguous()).T.contiguous()
            self.square = self.gram.diagonal().double().clone()
        else:  # without it, what the rotation spreads evenly is all that is known: the mean energy
            self.square = torch.full_like(self.square, float(self.square.mean()))

    def merge(self, other: Observer) -> None:
        assert isinstance(other, Moments)
        self.count += other.count
        self.total = self.total + other.total
        self.square = self.square + other.square
        if self.gram is not None and other.gram is not None:
            self.gram = self.gram + other.gram

    def state_dict(self) -> dict[str, Tensor]:
        state = {"count": torch.tensor(self.count), "total": self.total, "square": self.square}
        return state if self.gram is None else {**state, "gram": self.gram}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count, self.total, self.square = int(state["count"]), state["total"], state["square"]
        self.gram = state.get("gram")
