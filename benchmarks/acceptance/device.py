"""The GPU of this machine: kernels through CUDA's driver API, and times."""

from __future__ import annotations

import ctypes
import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.acceptance.steps import SkippedStep
from fusion_edge.benchmarks.latency.machine.nvidia import find_gpu
from fusion_edge.kernels.triton.kernel_folder import CompiledKernel
from fusion_edge.runtime.backends.cuda import Cuda, open_cuda
from fusion_edge.runtime.backends.tensorrt.memory import DeviceMemory
from fusion_edge.runtime.errors import DeviceError
from fusion_edge.runtime.system.jetson import this_jetson

REPEATS = 7


@dataclass(frozen=True)
class NoCuda:
    """Why nothing can run on a GPU. As text it is a sentence."""

    error: str
    """Error of CUDA or its bindings, as a sentence."""
    has_gpu: bool
    """Whether the machine has a GPU nevertheless."""

    def __str__(self) -> str:
        return f"{'CUDA cannot use the GPU' if self.has_gpu else 'There is no GPU'}: {self.error}"


def has_gpu() -> bool:
    """Return whether this machine has a GPU, whether or not CUDA's bindings can use it."""
    return this_jetson() is not None or find_gpu() is not None


def find_cuda() -> Cuda | NoCuda:
    """Open CUDA, or return why that fails: no GPU, no driver, or bindings that are missing or do not fit."""
    try:
        cuda = open_cuda()
        cuda.memory()  # creates a context, which a GPU in use or a driver that does not fit may refuse
        return cuda
    except DeviceError as error:
        return NoCuda(str(error), has_gpu())


def expect_cuda() -> Cuda:
    """Open CUDA. Raise :class:`SkippedStep` with the reason if it cannot be used."""
    cuda = find_cuda()
    if isinstance(cuda, NoCuda):
        raise SkippedStep(str(cuda))
    return cuda


def uploaded(memory: DeviceMemory, array: npt.NDArray[Any], stream: int) -> int:
    """Copy an array to new device memory and return its pointer."""
    source, pointer = memory.pinned(array.nbytes), memory.device(array.nbytes)
    source[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if array.nbytes:
        memory.cuda.to_device(pointer, source.ctypes.data, array.nbytes, stream)
    return pointer


def downloaded(memory: DeviceMemory, pointer: int, like: npt.NDArray[Any], stream: int) -> npt.NDArray[Any]:
    """Wait for a stream, and return device memory with the shape and type of an array."""
    target = memory.pinned(like.nbytes)
    if like.nbytes:
        memory.cuda.to_host(target.ctypes.data, pointer, like.nbytes, stream)
    memory.cuda.wait(stream)
    return target.view(like.dtype).reshape(like.shape)


def seconds_of(cuda: Cuda, stream: int, work: Callable[[], object]) -> float:
    """Return the median seconds of enqueued work on the device, after one run that is not counted."""
    start, end = cuda.event(), cuda.event()
    seconds = []
    for _ in range(1 + REPEATS):
        cuda.record(start, stream)
        work()
        cuda.record(end, stream)
        cuda.wait(stream)
        seconds.append(cuda.seconds_between(start, end))
    for event in (start, end):
        cuda.destroy_event(event)
    return statistics.median(seconds[1:])


class DriverKernel:
    """A kernel that CUDA's driver compiles from PTX, as TensorRT does with a plugin's."""

    def __init__(self, kernel: CompiledKernel) -> None:
        """Load a kernel into the context that CUDA's runtime API has made current. Raises :class:`DeviceError`."""
        self._driver = importlib.import_module("cuda.bindings.driver")
        self._kernel = kernel
        self._module = self._call("cuModuleLoadData", kernel.ptx.encode("ascii") + b"\0")
        self._function = self._call("cuModuleGetFunction", self._module, kernel.name.encode("ascii"))

    def launch(
        self, grid: tuple[int, int], inputs: Sequence[int], integers: Sequence[int], output: int, stream: int
    ) -> None:
        """Enqueue a launch with pointers to inputs, integers, and the pointer to the output, in this order."""
        values = (*inputs, *integers, output)
        types = (*[ctypes.c_void_p] * len(inputs), *[ctypes.c_int32] * len(integers), ctypes.c_void_p)
        shape = (*grid, 1, self._kernel.threads, 1, 1)
        self._call("cuLaunchKernel", self._function, *shape, self._kernel.shared_bytes, stream, (values, types), 0)

    def close(self) -> None:
        """Unload the kernel."""
        self._call("cuModuleUnload", self._module)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *results = getattr(self._driver, function)(*arguments)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            _, text = self._driver.cuGetErrorString(error)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise DeviceError(f"CUDA's {function} failed: {reason}.")
        return results[0] if results else None
