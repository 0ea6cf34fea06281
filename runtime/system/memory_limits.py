"""Limits on a process's memory (``ulimit -v``, ``ulimit -d``) that not even the libraries fit into.

NumPy's, tokenizers' and ONNX Runtime's own code ends a process in which memory runs out while they start, and no Python
hears of it. So it is told before they do. Limits of cgroups and of the machine are met later, if at all.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

LIBRARY_BYTES = 200_000_000
"""Address space of Python and all libraries (measured: 150 MB)."""
PROCESSOR_BYTES = 70_000_000
"""For each processor beside that: NumPy's buffers, a thread's stack in each of three graphs (measured: 42, 24 MB)."""
STATM_FIELDS = {resource.RLIMIT_AS: 0, resource.RLIMIT_DATA: 5}
"""Where ``/proc/self/statm`` tells how much of a limit is used."""
M_ARENA_MAX = -8  # malloc.h
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def address_space() -> int | None:
    """Bytes that this process may still map by its own limits; None without a limit."""
    kinds = [kind for kind in STATM_FIELDS if resource.getrlimit(kind)[0] != resource.RLIM_INFINITY]
    if not kinds:
        return None
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    left = (resource.getrlimit(kind)[0] - PAGE_BYTES * int(pages[STATM_FIELDS[kind]]) for kind in kinds)
    return max(0, min(left))


def too_little() -> str | None:
    """Why no command can start, a sentence; None if one can. Spares address space if it is limited."""
    left = address_space()
    if left is None:
        return None
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # or each thread would reserve 64 MB
    needed = LIBRARY_BYTES + PROCESSOR_BYTES * len(os.sched_getaffinity(0))
    if left >= needed:
        return None
    return (
        f"There is not enough memory to start ({needed / 1e6:,.0f} MB are needed, ulimit -v or -d leaves "
        f"{left / 1e6:,.0f} MB); raise that limit."
    )
