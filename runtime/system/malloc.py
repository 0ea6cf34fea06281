"""glibc's allocator."""

from __future__ import annotations

import ctypes

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def return_free_memory() -> None:
    """Give free memory of all threads back to the system, in about a millisecond. Does nothing without glibc.

    Once a block of up to 32 MiB was freed, glibc keeps blocks of that size, for each thread that frees one: a server
    would hold the memory of its largest requests forever. mallopt(3), M_MMAP_THRESHOLD.
    """
    if _TRIM is not None:
        _TRIM(0)
