"""Memory between guard pages: an access outside of it ends the process."""

from __future__ import annotations

import ctypes
import mmap
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NONE, READ, WRITE = 0, 1, 2  # of mmap(2)
FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class GuardedMemory:
    """Arrays between guard pages. Closing it unmaps all of them."""

    def __init__(self) -> None:
        self._mapped: list[tuple[int, int]] = []

    def __enter__(self) -> GuardedMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for start, size in self._mapped:
            _libc.munmap(start, size)
        self._mapped.clear()

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike, at_end: bool, off: int = 0) -> Array:
        """Return an uninitialized array, ``off`` bytes before the guard page after it, or after the one before it."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * int(np.prod(shape, dtype=object))
        pages = -(-(size + off) // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = pages + 2 * mmap.PAGESIZE
        start = _libc.mmap(None, whole, NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if start == FAILED:
            raise MemoryError(f"{whole} bytes")
        self._mapped.append((start, whole))
        first = start + mmap.PAGESIZE
        if pages and _libc.mprotect(first, pages, READ | WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        begin = first + pages - size - off if at_end else first + off
        memory = memoryview((ctypes.c_char * size).from_address(begin))
        array: Array = np.ndarray(shape, dtype, memory)
        return array

    def copy(self, array: Array, at_end: bool, off: int = 0) -> Array:
        """Return a copy of ``array``, placed as by :meth:`array`."""
        copied = self.array(array.shape, array.dtype, at_end, off)
        copied[...] = array
        return copied

    def make_read_only(self, array: Array) -> None:
        """Protect an array: a write to it ends the process."""
        start, size = next(mapped for mapped in self._mapped if mapped[0] <= address(array) < sum(mapped))
        if size > 2 * mmap.PAGESIZE:
            _libc.mprotect(start + mmap.PAGESIZE, size - 2 * mmap.PAGESIZE, READ)


def address(array: Array) -> int:
    """Return the address of the first byte of an array."""
    return int(array.__array_interface__["data"][0])
