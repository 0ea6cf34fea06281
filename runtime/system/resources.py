"""What of the machine this process may use: processors and memory, limits of its cgroup (a container's) included."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fusion_edge.runtime.backends.cuda import available_memory as available_to_all
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.system.memory_limits import address_space

ROOT = Path("/")
MOUNT = Path("sys/fs/cgroup")
OUT_OF_MEMORY = re.compile(
    "bad_alloc|allocate memory|(failed|unable) to allocate|out of memory|failed to map|pthread_create",
    re.IGNORECASE,
)


def usable_processors(root: Path = ROOT) -> int:
    """How many threads of this process run at once: what affinity and CPU quotas leave, rounded up.

    ``/proc`` and ``/sys`` lie in ``root``. ``os.cpu_count()`` counts the machine's: a container with one core of 128
    would start 128 threads, which wait for each other.
    """
    counts = [len(os.sched_getaffinity(0))]  # Linux, as every target is
    for folder in _cgroups("cpu", root):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdigit() for word in words):  # "max" and -1 are no limit
            quota, period = map(int, words)
            counts.append(-(-quota // max(period, 1)))
    return max(1, min(counts))


def check_threads(threads: int, name: str = "threads") -> None:
    """Raise :class:`UsageError` for more threads than processors: they would only wait for each other."""
    if threads > (usable := usable_processors()):
        raise UsageError(
            f"{name} is {threads}; choose at most {usable}, the processors that this process may use (affinity and CPU "
            "quota count)."
        )


def available_memory(root: Path = ROOT) -> int:
    """Bytes that this process can still get, by what the kernel, its cgroups and its own limits (``ulimit``) say."""
    counts = [available_to_all(info)] if (info := _text(root / "proc/meminfo")) else []
    for folder in _cgroups("memory", root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            words = _words(folder / limit) + _words(folder / usage)
            if len(words) == 2 and words[0].isdigit():  # "max" is no limit
                counts.append(int(words[0]) - int(words[1]) + _page_cache(folder))
    if (left := address_space()) is not None:
        counts.append(left)
    return max(0, min(counts, default=0))


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, by an error's type or what a library says; threads need memory for their stacks."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


def not_enough_memory(task: str, needed: int | None = None, on_host: bool = True) -> str:
    """The start of a sentence: there is not enough for a task such as ``load FILE``, and how much there is.

    ``needed``: its bytes, if known; ``on_host``: whether it is this machine's memory, not a GPU's own.
    """
    amounts = [] if needed is None else [f"{_megabytes(needed)} are needed"]
    if on_host:
        amounts.append(f"{_megabytes(available_memory())} are available")
    told = f" ({', '.join(amounts)})" if amounts else ""
    return f"There is not enough memory to {task}{told}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _page_cache(folder: Path) -> int:
    """Bytes of files that a cgroup is charged for and that the kernel gives back when asked for memory."""
    fields = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the cgroups that limit this process: its own and those around it, as far as they can be seen.

    A container may see its own as the root of the hierarchy, whatever path the host knows it by.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2, alone or beside the first
            mounts = ["", "unified"]
        elif controller in controllers.split(","):
            mounts = [controller, controllers]
        else:
            continue
        own = Path(path.lstrip("/"))
        yield from (root / MOUNT / mount / around for mount in mounts for around in (own, *own.parents))


def _text(path: Path) -> str:
    """What a file holds; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()
