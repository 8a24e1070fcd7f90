"""Keep freed pages: on Linux a fresh large tensor costs more in page faults than in arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
KEEP = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 16 << 20))
# where glibc's own adaptation ends up: set once, thresholds no longer adapt
USUAL = ((M_MMAP_MAX, 1 << 16), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20), (M_TOP_PAD, 128 << 10))


@contextlib.contextmanager
def reusing_pages() -> Iterator[bool]:
    """Inside, glibc's malloc hands freed blocks out again instead of returning them to the kernel; of the whole
    process. False where it cannot. Halves the time of the threshold search.
    """
    kept = _set(KEEP)
    try:
        yield kept
    finally:
        if kept:
            _set(USUAL)
            release_pages()


def keep_pages() -> None:
    """Let malloc keep up to 64 MiB of what forwards free, which otherwise faults in anew every time: half of a packed
    model's prefill. That is where glibc's own adaptation ends up once a block of 32 MiB has been freed, as conversions
    do while a float model loads. One that nobody touches costs nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _set(options: Sequence[tuple[int, int]]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc: musl, macOS, Windows
        return False
    return all(mallopt(option, value) for option, value in options)


def release_pages() -> None:
    """Give what is free back to the kernel: between blocks, so that one's peak does not lie on another's."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
