"""Memory of the TensorRT backend: device tensors, with pinned host memory for inputs and outputs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.cuda import Cuda

ALIGNMENT = 256
"""Alignment in bytes that TensorRT requires of its scratch memory."""


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
        pointer = self.cuda.allocate(max(size, ALIGNMENT))
        self._device.append(pointer)
        self.size += max(size, ALIGNMENT)
        return pointer

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Allocate pinned host memory."""
        pointer = self.cuda.allocate_pinned(max(size, 1))
        self._pinned.append(pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

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
