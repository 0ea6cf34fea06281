"""Processors and memory that this process may use, within the limits of its cgroup (container)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.system.memory_limits import address_space

ROOT = Path("/")
MOUNT = Path("sys/fs/cgroup")
OUT_OF_MEMORY = re.compile(
    "bad_alloc|allocate memory|(failed|unable) to allocate|out of memory|failed to map|pthread_create",
    re.IGNORECASE,
)


def usable_processors(root: Path = ROOT) -> int:
    """Return the number of processors within affinity, which cpusets limit, and CPU quota, rounded up.

    ``root`` holds ``/proc`` and ``/sys``. ``os.cpu_count()`` counts the machine's processors: in a container with one
    core of 128 it would start 128 threads that wait for each other.
    """
    counts = [len(os.sched_getaffinity(0))]
    for folder in _cgroups("cpu", root):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdigit() for word in words):  # "max" and -1 mean no limit
            quota, period = map(int, words)
            counts.append(-(-quota // max(period, 1)))
    return max(1, min(counts))


def check_threads(threads: int, name: str = "threads") -> None:
    """Raise :class:`UsageError` for more threads than usable processors."""
    if threads > (usable := usable_processors()):
        raise UsageError(
            f"{name} is {threads}; choose at most {usable}, the processors that this process may use (within affinity "
            "and CPU quota)."
        )


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes that this process can still allocate within the kernel's, its cgroup's and its own limits."""
    counts = [kernel_available(info)] if (info := _text(root / "proc/meminfo")) else []
    for folder in _cgroups("memory", root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            words = _words(folder / limit) + _words(folder / usage)
            if len(words) == 2 and words[0].isdigit():  # "max" means no limit
                counts.append(int(words[0]) - int(words[1]) + _page_cache(folder))
    if (left := address_space()) is not None:
        counts.append(left)
    return max(0, min(counts, default=0))


def kernel_available(meminfo: str) -> int:
    """Return the available bytes in the text of ``/proc/meminfo``: free memory and most of the page cache."""
    return memory_fields(meminfo)["MemAvailable"]


def memory_fields(meminfo: str) -> dict[str, int]:
    """Return the sizes in the text of ``/proc/meminfo`` in bytes, by name."""
    lines = (line.split(":", 1) for line in meminfo.splitlines() if line.endswith("kB"))
    return {name: 1024 * int(size.removesuffix("kB")) for name, size in lines}


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error, by its type or message, means that memory ran out. Threads need memory for stacks."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


def not_enough_memory(task: str, needed: int | None = None, on_host: bool = True) -> str:
    """Return the start of an error: not enough memory for a task such as ``load FILE``, with the figures.

    Args:
        task: Verb phrase.
        needed: Bytes of the task, if known.
        on_host: Whether the task needs host memory; a GPU has its own.
    """
    amounts = [] if needed is None else [f"{_megabytes(needed)} are needed"]
    if on_host:
        amounts.append(f"{_megabytes(available_memory())} are available")
    figures = f" ({', '.join(amounts)})" if amounts else ""
    return f"There is not enough memory to {task}{figures}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _page_cache(folder: Path) -> int:
    """Return the bytes of reclaimable page cache that a cgroup is charged for."""
    fields = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the visible folders of the cgroups that limit this process: its own and their parents.

    A container may see its own cgroup as the root of the hierarchy.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2, alone or together with version 1
            mounts = ["", "unified"]
        elif controller in controllers.split(","):
            mounts = [controller, controllers]
        else:
            continue
        own = Path(path.lstrip("/"))
        yield from (root / MOUNT / mount / group for mount in mounts for group in (own, *own.parents))


def _text(path: Path) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()
