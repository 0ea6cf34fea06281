"""Memory of the TensorRT backend: device tensors, with pinned host memory for inputs and outputs."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.base import KvPrefix
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.bundle.graphs import ADDRESS_ALIGNMENT


class DeviceMemory:
    """Device and pinned memory that is freed together."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.size = 0
        """Allocated device bytes."""
        self._device: list[int] = []
        self._pinned: list[int] = []

    def device(self, size: int) -> int:
        """Allocate zeroed device memory. TensorRT needs a pointer other than 0 even for an empty tensor."""
        pointer = self.cuda.allocate(max(size, ADDRESS_ALIGNMENT))
        self._device.append(pointer)
        self.size += max(size, ADDRESS_ALIGNMENT)
        return pointer

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Allocate pinned host memory."""
        pointer = self.cuda.allocate_pinned(max(size, 1))
        self._pinned.append(pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def free_device(self, pointer: int) -> None:
        """Free device memory before the rest."""
        self._device.remove(pointer)
        self.cuda.free(pointer)

    def close(self) -> None:
        """Free all memory."""
        for pointer in self._device:
            self.cuda.free(pointer)
        for pointer in self._pinned:
            self.cuda.free_pinned(pointer)
        self._device, self._pinned = [], []


class DeviceTensor:
    """Memory of a tensor for its largest shape."""

    def __init__(self, memory: DeviceMemory, dtype: str, shape: Sequence[int], on_host: bool) -> None:
        """Allocate device memory, and with ``on_host`` pinned memory for :meth:`upload` and :meth:`download`."""
        self.dtype = np.dtype(dtype)
        self.shape = tuple(shape)
        self._cuda = memory.cuda
        self._size = math.prod(shape) * self.dtype.itemsize
        self.pointer = memory.device(self._size)
        self._pinned = memory.pinned(self._size) if on_host else None

    def host(self, shape: Sequence[int]) -> npt.NDArray[Any]:
        """Return a view of the pinned memory."""
        assert self._pinned is not None
        return self._pinned[: math.prod(shape) * self.dtype.itemsize].view(self.dtype).reshape(shape)

    def upload(self, array: npt.NDArray[Any], stream: int) -> None:
        """Enqueue a copy of an array to the device. The stream uses the pinned memory until then."""
        self.host(array.shape)[...] = array
        self.send(array.shape, stream)

    def send(self, shape: Sequence[int], stream: int) -> None:
        """Enqueue a copy of the pinned memory to the device."""
        assert self._pinned is not None
        size = math.prod(shape) * self.dtype.itemsize
        if size:
            self._cuda.to_device(self.pointer, self._pinned.ctypes.data, size, stream)

    def download(self, shape: Sequence[int], stream: int) -> npt.NDArray[Any]:
        """Enqueue a copy to the pinned memory. The returned view is valid once the stream has done it."""
        assert self._pinned is not None
        size = math.prod(shape) * self.dtype.itemsize
        self._cuda.to_host(self._pinned.ctypes.data, self.pointer, size, stream)
        return self.host(shape)

    def read(self, shape: Sequence[int], stream: int) -> npt.NDArray[Any]:
        """Return a copy on the host, once the stream has done its work. The tensor needs no pinned memory."""
        size = math.prod(shape) * self.dtype.itemsize
        pointer = self._cuda.allocate_pinned(size)
        try:
            self._cuda.to_host(pointer, self.pointer, size, stream)
            self._cuda.wait(stream)
            return np.frombuffer(ctypes.string_at(pointer, size), self.dtype).reshape(shape)
        finally:
            self._cuda.free_pinned(pointer)


class KvPrefixes:
    """Copies of starts of the KV cache in device memory. Engines read the cache at one address."""

    def __init__(self, memory: DeviceMemory, caches: Sequence[DeviceTensor]) -> None:
        """``caches`` are ``[1,heads,capacity,width]``."""
        self._memory = memory
        self._caches = caches
        self._resident: Callable[[], KvPrefix | None] = lambda: None
        self._free: list[tuple[int, int]] = []
        """Length and pointer of copies whose prefixes are garbage."""

    def keep(self, length: int, stream: int) -> KvPrefix:
        """Enqueue a copy of the first ``length`` tokens of the cache, and return it as a prefix."""
        prefix = KvPrefix(length, self._pointer(length))
        weakref.finalize(prefix, self._free.append, (length, prefix.memory))
        self._resident = weakref.ref(prefix)
        for cache, at, pitch, size in self._rows(prefix):
            self._memory.cuda.copy_rows(at, size, cache.pointer, pitch, size, cache.shape[1], stream)
        return prefix

    def restore(self, prefix: KvPrefix | None, stream: int) -> None:
        """Enqueue a copy of a prefix to the cache, unless it is there. None: the cache is about to be overwritten."""
        if prefix is not None and self._resident() is prefix:
            return
        self._resident = lambda: None  # also if a copy fails
        if prefix is None:
            return
        for cache, at, pitch, size in self._rows(prefix):
            self._memory.cuda.copy_rows(cache.pointer, pitch, at, size, size, cache.shape[1], stream)
        self._resident = weakref.ref(prefix)

    def _rows(self, prefix: KvPrefix) -> Iterator[tuple[DeviceTensor, int, int, int]]:
        """Yield each cache, the pointer of its copy, and the bytes of a head in the cache and in the copy."""
        at = prefix.memory
        for cache in self._caches:
            _, heads, capacity, width = cache.shape
            token = width * cache.dtype.itemsize
            yield cache, at, capacity * token, prefix.length * token
            at += heads * prefix.length * token

    def _pointer(self, length: int) -> int:
        """Return memory for a prefix: that of an earlier one of this length, or new. Free all other copies."""
        found = None
        while self._free:
            size, pointer = self._free.pop()
            if found is None and size == length:
                found = pointer
            else:
                self._memory.free_device(pointer)
        return self._memory.device(length * self._token_bytes) if found is None else found

    @property
    def _token_bytes(self) -> int:
        return sum(cache.shape[1] * cache.shape[3] * cache.dtype.itemsize for cache in self._caches)
