"""A fake of ``cuda.bindings.driver`` for ``fake_cuda.py``: kernels run in the PTX interpreter."""

from __future__ import annotations

import ctypes
import re
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
from fakes.fake_cuda import FakeCuda, Misuse

from fusion_edge.kernels.ptx.machine import run

MILLISECONDS = 0.25
"""Duration of every kernel."""


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_PTX = 218
    CUDA_ERROR_NOT_FOUND = 500


class FakeCudaDriver(ModuleType):
    """The fake module: a module is its PTX, and a kernel as well."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("cuda.bindings.driver")
        self._cuda, self.CUresult = cuda, CUresult
        self.loaded: list[str] = []
        """Modules that are not unloaded."""

    def cuGetErrorString(self, error: CUresult) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, f"{error.name} of the fake".encode()

    def cuModuleLoadData(self, image: bytes) -> tuple[CUresult, str | None]:
        if not image.endswith(b"\0"):
            raise Misuse("PTX must end with a zero.")
        ptx = image[:-1].decode("ascii")
        if ".version" not in ptx:
            return CUresult.CUDA_ERROR_INVALID_PTX, None
        self.loaded.append(ptx)
        return CUresult.CUDA_SUCCESS, ptx

    def cuModuleUnload(self, module: str) -> tuple[CUresult]:
        self.loaded.remove(module)
        return (CUresult.CUDA_SUCCESS,)

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[CUresult, str | None]:
        if re.search(rf"\.entry\s+{name.decode()}\b", module) is None:
            return CUresult.CUDA_ERROR_NOT_FOUND, None
        return CUresult.CUDA_SUCCESS, module

    def cuLaunchKernel(self, function: str, *arguments: Any) -> tuple[CUresult]:
        """Enqueue a kernel. A pointer must be the start of an allocation."""
        *sizes, shared, stream, (values, types), extra = arguments
        grid, block = sizes[:3], sizes[3:]
        if block[1:] != [1, 1] or extra != 0:
            raise Misuse("The fake knows blocks of one dimension, and no extra options.")
        buffers: dict[int, np.ndarray[Any, Any]] = {}
        passed: list[Any] = []
        for value, kind in zip(values, types, strict=True):
            if kind is ctypes.c_void_p:
                size = self._cuda.allocations[value].size
                passed.append(buffers.setdefault(value, self._cuda.view(value, size)))
            else:
                passed.append(value)

        def work() -> None:
            run(function, grid=tuple(grid), block=block[0], arguments=passed, shared_bytes=shared)
            self._cuda.clock += MILLISECONDS

        self._cuda.enqueue(stream, work)
        return (CUresult.CUDA_SUCCESS,)
