"""What every observer does: take rows, merge with another or with all ranks, survive a round trip through tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from calib.errors import NumericsError

BLOCK = 1 << 17  # elements worked on at a time: half a megabyte of fp32 stays in a core's second-level cache
DEVICE_BLOCK = 1 << 22  # elsewhere (CUDA) the cost of a launch counts, not the cache


def block_rows(n: int, device: torch.device) -> int:
    """How many rows of n channels are worked on at a time."""
    return max(1, (BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(n, 1))


def _applies(x: Tensor, mask: Tensor | None) -> Tensor | None:
    return None if mask is None or mask.shape != x.shape[:-1] or bool(mask.all()) else mask


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [..., n] as rows [T, n], those the mask [...] (bool) keeps; a mask of another shape does not apply."""
    rows, mask = x.detach().reshape(-1, x.shape[-1]), _applies(x, mask)
    return rows if mask is None else rows[mask.reshape(-1)]


def row_blocks(x: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, int | Tensor]]:
    """The same rows in the same order as blocks [t, n], each with the position in x (padding included) of its first
    row, or the positions [t] of all where the mask drops some.

    x is never copied as a whole: a block is a view of it, or a small gather where the mask drops rows.
    """
    yield from _blocks(x.detach(), _applies(x, mask), 0)


def _blocks(x: Tensor, mask: Tensor | None, at: int) -> Iterator[tuple[Tensor, int | Tensor]]:
    n = x.shape[-1]
    try:
        rows = x.view(-1, n)
    except RuntimeError:  # its strides do not merge: one slab after the other
        for i, slab in enumerate(x):
            yield from _blocks(slab, None if mask is None else mask[i], at + i * (slab.numel() // n))
        return
    if mask is None:
        yield rows, at
        return
    for kept in mask.reshape(-1).nonzero()[:, 0].split(block_rows(n, x.device)):
        yield rows[kept], kept + at


class Observer(ABC):
    """A streaming, mergeable accumulator over rows [T, n]."""

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Take rows [T, n] of any float dtype and any strides; T may be 0."""

    @abstractmethod
    def merge(self, other: Observer) -> None:
        """Become the observer of both row sets."""

    @abstractmethod
    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Become, on every rank of the group alike to the bit, the observer of all ranks' rows.

        Call it once, after the last update. Does nothing where torch.distributed is not initialised.
        """

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
