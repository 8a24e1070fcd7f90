"""What every observer does: take masked rows, merge with another, survive a round trip through tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from calib.errors import NumericsError

ROW_BLOCK = 256  # rows worked on at a time: small temporaries stay in cache


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [..., n] as rows [T, n], those the mask [...] (bool) keeps; a mask of another shape does not apply."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or mask.shape != x.shape[:-1] or bool(mask.all()):
        return rows
    return rows[mask.reshape(-1)]


class Observer(ABC):
    """A streaming, mergeable accumulator over rows [T, n]."""

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Take rows [T, n] of any float dtype."""

    @abstractmethod
    def merge(self, other: Observer) -> None:
        """Become the observer of both row sets."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors (safetensors-ready)."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave."""


def check_finite(x: Tensor, what: str) -> None:
    """Raise NumericsError where x holds NaN or inf."""
    if not bool(torch.isfinite(x).all()):
        raise NumericsError(f"{what} holds NaN or inf", "check the weights and the input data, or use a wider dtype")
