"""Memory that knows who accessed it last. It checks bounds, alignment, initialization and data races.

A **data race** is two accesses of different threads to the same bytes, one at least a store, that nothing orders. A
barrier orders the threads of a block; nothing orders blocks. The threads of a warp are no exception: since Volta each
may run on its own, and neither a shuffle nor ``ldmatrix`` orders memory. One case is no race: stores of equal values,
of which any may be last. Whoever reads them needs a barrier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_edge.kernels.ptx.errors import DataRace, InvalidLaunch, Misaligned, OutOfBounds, Uninitialized
from fusion_edge.kernels.ptx.parser import SHARED_BASE
from fusion_edge.kernels.ptx.threads import Active, Indices, Launch, Mask, Values

CELL = 2
"""Bytes of the smallest access. Accesses are tracked for each cell."""
NOBODY, SEVERAL = -1, -2
BUFFER_BITS = 40
"""Buffers lie 1 TiB apart: no wrong index leads from one to another."""
BUFFER_BASE = 16
"""Triton compiles for pointers that are multiples of 16. A buffer's is no multiple of 32."""


@dataclass(frozen=True)
class _Who:
    """Who accesses cells: the thread, its block, and the barriers that it has passed, each ``[threads, cells]``."""

    thread: Indices
    block: Indices
    phase: Indices


class _Accesses:
    """The last loads, or stores, of each cell."""

    def __init__(self, cells: int) -> None:
        self._thread, self._block, self._phase = np.full((3, cells), NOBODY)
        """Thread and block are SEVERAL where more than one accessed the cell, and nothing orders them."""

    def exist(self, at: Indices) -> Mask:
        """Return which of the cells ``at`` have been accessed."""
        return np.asarray(self._block[at] != NOBODY)

    def are_unordered(self, at: Indices, who: _Who) -> Mask:
        """Return which of the cells another thread has accessed, with nothing that orders the two accesses."""
        block = self._block[at]
        in_block = (block == who.block) & (self._phase[at] == who.phase) & (self._thread[at] != who.thread)
        return np.asarray(in_block | ((block != NOBODY) & (block != who.block)))

    def record(self, at: Indices, who: _Who) -> None:
        """Note an access."""
        is_unordered, other_blocks = self.are_unordered(at, who), self.exist(at) & (self._block[at] != who.block)
        self._thread[at], self._block[at], self._phase[at] = who.thread, who.block, who.phase
        # Of several threads that access one cell at once, the last is found there.
        self._thread[at[is_unordered | (self._thread[at] != who.thread)]] = SEVERAL
        self._block[at[other_blocks | (self._block[at] != who.block)]] = SEVERAL


class Memory(ABC):
    """Cells of two bytes, and the last accesses to each."""

    def __init__(self, cells: int, *, initialized: bool) -> None:
        self._cells, self._initialized = np.zeros(cells, np.uint16), initialized
        self._loads, self._stores = _Accesses(cells), _Accesses(cells)

    @abstractmethod
    def _offsets(self, active: Active, addresses: Indices, size: int) -> Indices:
        """Return the byte in the cells for each address. Raises :class:`OutOfBounds`."""

    def _locate(self, active: Active, addresses: Indices, size: int) -> Indices:
        """Return the cells ``[threads, cells]`` of an access to ``size`` bytes at ``addresses`` ``[threads]``."""
        aligned: Mask = addresses % size == 0
        active.require(aligned, Misaligned, lambda i: f"address {addresses[i]:#x} is no multiple of {size} bytes")
        return self._offsets(active, addresses, size)[:, None] // CELL + np.arange(size // CELL)

    def load(self, active: Active, addresses: Indices, used: Mask) -> Values:
        """Return the cells ``[threads, cells]`` uint16 at ``addresses``. Only ``used`` ones ``[cells]`` are read."""
        at = self._locate(active, addresses, CELL * len(used))
        loaded, at = self._cells[at], at[:, used]
        if not self._initialized:
            written: Mask = np.all(self._stores.exist(at), axis=1)
            active.require(written, Uninitialized, "it reads shared memory that nothing wrote")
        who = _who(active, at)
        _require_order(active, self._stores.are_unordered(at, who))
        self._loads.record(at, who)
        return loaded

    def store(self, active: Active, addresses: Indices, values: Values) -> None:
        """Write ``values`` ``[threads, cells]`` uint16 at ``addresses``."""
        at = self._locate(active, addresses, CELL * values.shape[1])
        who = _who(active, at)
        overwritten = self._stores.are_unordered(at, who) & (self._cells[at] != values)
        _require_order(active, overwritten | self._loads.are_unordered(at, who))
        self._stores.record(at, who)
        self._cells[at] = values
        _require_order(active, self._cells[at] != values)  # of several threads that write one cell at once, one wins


def _who(active: Active, at: Indices) -> _Who:
    thread = active.threads
    who = thread, thread // active.launch.block, active.phases[thread]
    return _Who(*(np.broadcast_to(one[:, None], at.shape) for one in who))


def _require_order(active: Active, races: Mask) -> None:
    reason = "another thread accesses the same bytes, and no barrier orders the two"
    active.require(~np.any(races, axis=1), DataRace, reason)


class GlobalMemory(Memory):
    """The buffers of a launch."""

    def __init__(self, arrays: Sequence[Values]) -> None:
        """Copy the arrays; one that is given twice is one buffer. Raises :class:`InvalidLaunch`."""
        self._arrays: list[Values] = []
        for array in arrays:
            if not (array.flags.c_contiguous and array.flags.writeable) or array.nbytes % CELL:
                raise InvalidLaunch("A buffer must be a contiguous, writable array of an even number of bytes.")
            if self._index(array) is None:
                if any(np.may_share_memory(array, other) for other in self._arrays):
                    raise InvalidLaunch("Two buffers overlap. Pass the same array, or arrays that share no memory.")
                self._arrays.append(array)
        self._sizes = np.array([array.nbytes for array in self._arrays], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        super().__init__(int(self._sizes.sum()) // CELL, initialized=True)
        for array, start in zip(self._arrays, self._starts, strict=True):
            self._part(start, array)[:] = array.reshape(-1).view(np.uint16)

    def address(self, array: Values) -> int:
        """Return the address of a buffer."""
        index = self._index(array)
        assert index is not None
        return ((index + 1) << BUFFER_BITS) + BUFFER_BASE

    def copy_back(self) -> None:
        """Write the buffers to their arrays."""
        for array, start in zip(self._arrays, self._starts, strict=True):
            array.reshape(-1).view(np.uint16)[:] = self._part(start, array)

    def _part(self, start: int, array: Values) -> Values:
        return self._cells[start // CELL : (start + array.nbytes) // CELL]

    def _index(self, array: Values) -> int | None:
        same = [other.ctypes.data == array.ctypes.data and other.nbytes == array.nbytes for other in self._arrays]
        return same.index(True) if any(same) else None

    def _offsets(self, active: Active, addresses: Indices, size: int) -> Indices:
        index = (addresses >> BUFFER_BITS) - 1
        offset = addresses - ((index + 1) << BUFFER_BITS) - BUFFER_BASE
        known = (index >= 0) & (index < len(self._sizes))
        inside = known & (offset >= 0)
        inside[known] &= offset[known] + size <= self._sizes[index[known]]

        def reason(position: int) -> str:
            place = f"byte {offset[position]} of buffer {index[position]}" if known[position] else "no buffer"
            return f"{size} bytes at address {addresses[position]:#x} ({place}) are outside of every buffer"

        active.require(inside, OutOfBounds, reason)
        located: Indices = self._starts[index] + offset
        return located


class SharedMemory(Memory):
    """The dynamic shared memory of every block."""

    def __init__(self, launch: Launch, size: int) -> None:
        self._size = -(-size // CELL) * CELL
        super().__init__(launch.blocks * self._size // CELL, initialized=False)

    def _offsets(self, active: Active, addresses: Indices, size: int) -> Indices:
        offset = addresses - SHARED_BASE
        inside: Mask = (offset >= 0) & (offset + size <= self._size)

        def reason(position: int) -> str:
            return f"{size} bytes at offset {offset[position]} are outside of {self._size} bytes of shared memory"

        active.require(inside, OutOfBounds, reason)
        located: Indices = active.threads // active.launch.block * self._size + offset
        return located
