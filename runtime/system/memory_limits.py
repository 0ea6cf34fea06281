"""Memory limits of the process (``ulimit -v``, ``ulimit -d``) that are too low to load the libraries.

NumPy, tokenizers and ONNX Runtime abort the process if memory runs out while they load. So the limits are checked
first. Limits of cgroups and of the machine take effect later, if at all.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

LIBRARY_BYTES = 200_000_000
"""Address space of Python and all libraries; measured: 150 MB."""
PROCESSOR_BYTES = 70_000_000
"""Address space for each processor: NumPy's buffers, and a thread stack in each graph; measured: 42 and 24 MB."""
STATM_FIELDS = {resource.RLIMIT_AS: 0, resource.RLIMIT_DATA: 5}
"""Field of ``/proc/self/statm`` that counts against each limit."""
M_ARENA_MAX = -8  # malloc.h
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def address_space() -> int | None:
    """Return the bytes that this process may still map within its own limits; None without a limit."""
    kinds = [kind for kind in STATM_FIELDS if resource.getrlimit(kind)[0] != resource.RLIM_INFINITY]
    if not kinds:
        return None
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    left = (resource.getrlimit(kind)[0] - PAGE_BYTES * int(pages[STATM_FIELDS[kind]]) for kind in kinds)
    return max(0, min(left))


def start_error() -> str | None:
    """Return the reason why no command can start, as a sentence; None if one can.

    Also save address space if it is limited.
    """
    left = address_space()
    if left is None:
        return None
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # otherwise each thread reserves 64 MB
    needed = LIBRARY_BYTES + PROCESSOR_BYTES * len(os.sched_getaffinity(0))
    if left >= needed:
        return None
    return (
        f"There is not enough memory to start: {needed / 1e6:,.0f} MB are needed, and ulimit -v or -d leaves "
        f"{left / 1e6:,.0f} MB; raise that limit."
    )
