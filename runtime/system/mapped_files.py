"""Files that this process maps: read their pages in, and lock them in memory."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.resources import not_enough_memory

LIBC = ctypes.CDLL(None, use_errno=True)
POPULATE_READ = 22
"""``MADV_POPULATE_READ`` of Linux 5.14."""
ON_FAULT = 1
"""``MLOCK_ONFAULT``: pages are locked when they are read."""
STEP = 16 << 20
"""Bytes that are read between two steps of progress."""


@dataclass(frozen=True)
class MappedRange:
    """A range of this process's memory that maps a part of a file; all sizes are in bytes and whole pages."""

    path: Path
    offset: int
    size: int
    address: int


def mapped_ranges(paths: Iterable[Path]) -> list[MappedRange]:
    """Return the ranges that map any of the files, by whatever library."""
    names = {os.path.realpath(path).replace("\n", "\\012"): path for path in paths}
    found = []
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n"):
        addresses, _, offset, _, _, *name = [*line.split(maxsplit=5), *5 * [""]][:6]
        if name and (path := names.get(name[0])):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(MappedRange(path, int(offset, 16), end - start, start))
    return found


def read_in(ranges: Sequence[MappedRange], advance: Callable[[int], None]) -> None:
    """Read all pages into memory and enter them into the page table, so that no access waits for a page.

    ``advance`` receives the bytes read. A range that another thread unmaps meanwhile is left out. Raises
    :class:`FusionError` if a page cannot be read, or Linux is older than 5.14.
    """
    for mapped in ranges:
        for start in range(0, mapped.size, STEP):
            size = min(STEP, mapped.size - start)
            try:
                _call("madvise", mapped.address + start, size, POPULATE_READ)
            except OSError as error:
                if error.errno == errno.ENOMEM and mapped not in mapped_ranges([mapped.path]):
                    break
                raise FusionError(_unreadable(mapped.path, error)) from None
            advance(size)


def _unreadable(path: Path, error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return f"Weights cannot be preloaded on Linux {os.uname().release}; use 5.14 or later, or drop preload."
    if error.errno == errno.ENOMEM:
        return f"{not_enough_memory(f'preload {path}')}; close other programs, or drop preload."
    return f"{path} cannot be read into memory ({os.strerror(error.errno or 0)}); copy or export the bundle again."


class LockedFiles:
    """Parts of files whose pages stay in memory until :meth:`release`, or until the object is garbage.

    They are mapped once more, shared and read-only. Locking a private writable mapping, as ONNX Runtime's are, would
    copy every page.
    """

    def __init__(self, ranges: Iterable[MappedRange]) -> None:
        """Allow for the parts that ``ranges`` map; :meth:`lock` reads and locks them.

        Raises :class:`FusionError` if this process may not lock so much memory.
        """
        self._parts = file_parts(ranges)
        self.size = sum(size for parts in self._parts.values() for _, size in parts)
        """Bytes."""
        self._files: dict[Path, npt.NDArray[np.uint8]] = {path: np.memmap(path, np.uint8, "r") for path in self._parts}
        self._lock_all("mlock2", ON_FAULT)

    def lock(self) -> None:
        """Read and lock all pages. Raises :class:`FusionError` if there is not enough memory."""
        self._lock_all("mlock")

    def release(self) -> None:
        """Unlock all pages."""
        self._files.clear()

    def _lock_all(self, function: str, *flags: int) -> None:
        try:
            for path, parts in self._parts.items():
                for offset, size in parts:
                    _call(function, self._files[path].ctypes.data + offset, size, *flags)
        except OSError as error:
            self.release()
            raise FusionError(self._refusal(error)) from None

    def _refusal(self, error: OSError) -> str:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit != resource.RLIM_INFINITY and error.errno in (errno.ENOMEM, errno.EPERM):
            return (
                f"lock_memory needs to lock {self.size:,} bytes, and this process may lock {limit:,}; raise the limit "
                f"(ulimit -l {-(-self.size // 1024)}, LimitMEMLOCK={self.size} in a systemd unit), or drop lock_memory."
            )
        problem = not_enough_memory("lock the weights", self.size)
        return f"{problem}: {os.strerror(error.errno or 0)}; close other programs, or drop lock_memory."


def file_parts(ranges: Iterable[MappedRange]) -> dict[Path, list[tuple[int, int]]]:
    """Return offset and size of the parts that ``ranges`` map, by file, in order and without overlap."""
    parts: dict[Path, list[tuple[int, int]]] = {}
    for mapped in sorted(ranges, key=lambda one: one.offset):
        of_file = parts.setdefault(mapped.path, [(mapped.offset, 0)])
        offset, size = of_file[-1]
        end = mapped.offset + mapped.size
        if mapped.offset <= offset + size:
            of_file[-1] = offset, max(offset + size, end) - offset
        else:
            of_file.append((mapped.offset, mapped.size))
    return parts


def _call(function: str, address: int, size: int, *flags: int) -> None:
    """Call a function of the C library on a range of memory. Raises OSError."""
    if getattr(LIBC, function)(ctypes.c_void_p(address), ctypes.c_size_t(size), *flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
