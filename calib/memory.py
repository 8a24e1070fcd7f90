"""Pages: on Linux a fresh large tensor costs more in page faults than in arithmetic, and what is not used may go."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
MADV_PAGEOUT = 21  # of Linux
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
    """Let malloc keep up to 64 MiB of what forwards free, which otherwise faults in anew every time.

    That is where glibc's own adaptation ends up once a block of 32 MiB has been freed, as conversions do while a float
    model loads. One that nobody touches costs nothing.
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


def page_out(tensor: Tensor) -> None:
    """Give pages that mirror a file back to the kernel until somebody asks for them; their values stay. Linux only, and
    nothing happens to memory that is no file's.
    """
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if last > first and _of_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT)


def _of_file(first: int, last: int) -> bool:
    """Whether the addresses lie in one mapping of a file."""
    try:
        maps = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    for span, _, _, _, inode, *_ in (line.split(None, 5) for line in maps):
        begin, end = (int(each, 16) for each in span.split(b"-"))
        if begin <= first < end:
            return last <= end and inode != b"0"
    return False
