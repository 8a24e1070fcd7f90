"""Hidden states between blocks: in memory up to a budget, the rest in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor


class HiddenStates:
    """A list of tensors, one a batch, that keeps at most ``budget`` bytes in memory.

    What does not fit lies in an unnamed temporary file in ``folder``, gone when the process ends, however it ends. It
    is read and written, not mapped: mapped pages would count as this process's memory. A replaced tensor has the
    size of the one before, and takes its place: states that moved with every block would leave holes all over the heap.
    """

    def __init__(self, budget: int | None = None, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self._kept: list[Tensor | None] = []
        self._places: list[tuple[int, torch.Size, torch.dtype] | None] = []
        self._used = self._end = 0
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, tensor: Tensor) -> None:
        size = _nbytes(tensor)
        if self.budget is None or self._used + size <= self.budget:
            self._used += size
            self._kept.append(tensor.clone(memory_format=torch.contiguous_format))
            self._places.append(None)
            return
        self._kept.append(None)
        self._places.append((self._end, tensor.shape, tensor.dtype))
        self._end += size
        self[len(self) - 1] = tensor

    def __getitem__(self, i: int) -> Tensor:
        """Batch i's, until it is replaced."""
        kept, place = self._kept[i], self._places[i]
        if kept is not None:
            return kept
        assert place is not None
        offset, shape, dtype = place
        tensor = torch.empty(shape, dtype=dtype)
        file, view = self._open(), _view(tensor)
        file.seek(offset)
        while len(view):  # one call moves 2 GiB at most, and on a full disk less
            if not (got := file.readinto(view)):  # type: ignore[attr-defined]
                raise OSError(f"the file of hidden states lacks {len(view)} of {_nbytes(tensor)} bytes")
            view = view[got:]
        return tensor

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        kept, place = self._kept[i], self._places[i]
        if kept is not None:
            kept.copy_(tensor)
            return
        assert place is not None
        offset, shape, dtype = place
        assert tensor.shape == shape and tensor.dtype == dtype
        file, view = self._open(), _view(tensor.contiguous())
        file.seek(offset)
        while len(view):  # what a short write left out would be read back as zeros
            view = view[file.write(view) :]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        return self._file

    @property
    def on_disk(self) -> int:
        """Bytes in the file."""
        return self._end


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _view(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
