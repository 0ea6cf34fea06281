"""Memory of a TensorRT backend: tensors on the device, and pinned memory of those that the host reads or writes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.cuda import Cuda

ALIGNMENT = 256  # bytes: what TensorRT asks of the memory that it works in


class DeviceMemory:
    """Allocations that are freed together."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.size = 0
        """Bytes on the device."""
        self._device: list[int] = []
        self._pinned: list[int] = []

    def device(self, size: int) -> int:
        """Device memory, all zero; its pointer is never 0, also of an empty tensor, as TensorRT asks."""
        pointer = self.cuda.allocate(max(size, ALIGNMENT))
        self._device.append(pointer)
        self.size += max(size, ALIGNMENT)
        return pointer

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Pinned host memory as bytes."""
        pointer = self.cuda.allocate_pinned(max(size, 1))
        self._pinned.append(pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def close(self) -> None:
        """Free everything."""
        for pointer in self._device:
            self.cuda.free(pointer)
        for pointer in self._pinned:
            self.cuda.free_pinned(pointer)
        self._device, self._pinned = [], []


class DeviceTensor:
    """A tensor's memory, for its largest shape."""

    def __init__(self, memory: DeviceMemory, dtype: str, shape: Sequence[int], on_host: bool) -> None:
        """``on_host``: with pinned memory, for :meth:`upload` and :meth:`download`."""
        self.dtype = np.dtype(dtype)
        self._cuda = memory.cuda
        self._size = math.prod(shape) * self.dtype.itemsize
        self.pointer = memory.device(self._size)
        self._pinned = memory.pinned(self._size) if on_host else None

    def host(self, shape: Sequence[int]) -> npt.NDArray[Any]:
        """The pinned memory as an array."""
        assert self._pinned is not None
        return self._pinned[: math.prod(shape) * self.dtype.itemsize].view(self.dtype).reshape(shape)

    def upload(self, array: npt.NDArray[Any], stream: int) -> None:
        """Copy an array, in the tensor's type, to the device; the pinned memory is in use until the stream is there."""
        self.host(array.shape)[...] = array
        self.send(array.shape, stream)

    def send(self, shape: Sequence[int], stream: int) -> None:
        """Copy what the pinned memory holds to the device."""
        assert self._pinned is not None
        size = math.prod(shape) * self.dtype.itemsize
        if size:
            self._cuda.to_device(self.pointer, self._pinned.ctypes.data, size, stream)

    def download(self, shape: Sequence[int], stream: int) -> npt.NDArray[Any]:
        """Copy to the pinned memory, as an array that is filled once the stream is there."""
        assert self._pinned is not None
        size = math.prod(shape) * self.dtype.itemsize
        self._cuda.to_host(self._pinned.ctypes.data, self.pointer, size, stream)
        return self.host(shape)
