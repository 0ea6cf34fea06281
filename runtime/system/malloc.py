"""glibc's allocator: memory of large requests goes back to the system."""

from __future__ import annotations

import ctypes

TRIMMED_BYTES = 1 << 20
"""Size of a part of a request from which on :func:`return_free_memory` is worth its time."""
_LARGE, _KEPT = 2 << 20, 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_C = ctypes.CDLL(None)
_TRIM, _MALLOPT = getattr(_C, "malloc_trim", None), getattr(_C, "mallopt", None)


def return_large_blocks() -> None:
    """Let every large block go back to the system once it is freed. Does nothing without glibc.

    By default glibc raises this threshold to the largest block that was freed, up to 32 MiB, and then keeps blocks of
    that size for each thread: a server would hold the memory of its largest requests forever. A fixed threshold also
    fixes how much free memory smaller blocks may keep, so that is set, too. mallopt(3).
    """
    if _MALLOPT is not None:
        _MALLOPT(_M_MMAP_THRESHOLD, _LARGE)
        _MALLOPT(_M_TRIM_THRESHOLD, _KEPT)


def return_free_memory() -> None:
    """Give free memory of all threads back to the system, in about a millisecond. Does nothing without glibc."""
    if _TRIM is not None:
        _TRIM(0)
