"""Keep freed pages: on Linux a fresh large tensor costs more in page faults than in arithmetic."""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@functools.lru_cache(maxsize=1)
def reuse_pages() -> bool:
    """Have glibc's malloc hand freed blocks out again instead of returning them to the kernel. False where it cannot.

    Halves the time of the threshold search; applies to the whole process, once.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc: musl, macOS, Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_TOP_PAD, 16 << 20))


def release_pages() -> None:
    """Give what is free back to the kernel: between blocks, so that one's peak does not lie on another's."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
