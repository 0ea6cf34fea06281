"""CUDA through NVIDIA's ``cuda-bindings``: memory, copies, one stream, events, graphs. Every call is checked.

Pointers are integers. No other file calls CUDA.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from fusion_edge.runtime.errors import DeviceError

INSTALL = "pip install 'cuda-bindings==13.0.*' for CUDA 13, cuda-python==12.6.2.post1 for CUDA 12.6 (JetPack 6)"

MEMORY_INFO = Path("/proc/meminfo")


class Cuda:
    """The current device of this process."""

    def __init__(self, module: ModuleType) -> None:
        """``module`` is ``cuda.bindings.runtime``. Raises :class:`DeviceError` if there is no GPU that works."""
        self._cuda = module
        if self._call("cudaGetDeviceCount") == 0:
            raise DeviceError("CUDA finds no GPU; see what nvidia-smi says.")

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a function returns beside its error code. Raises :class:`DeviceError` for an error."""
        try:
            error, *results = getattr(self._cuda, function)(*arguments)
        except RuntimeError as failure:  # the bindings of CUDA 12.6 look for the driver only now
            raise DeviceError(f"CUDA cannot be used: {failure}.") from None
        if error != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(error)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise DeviceError(f"CUDA's {function} failed: {reason}.")
        return results[0] if len(results) == 1 else tuple(results)

    def compute_capability(self) -> str:
        """Of the GPU, such as ``8.7``."""
        attributes = self._cuda.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
        return f"{major}.{minor}"

    def memory(self) -> tuple[int, int]:
        """Free and all bytes of the device; of a Jetson, those of the machine.

        There files that were just read take what CUDA would count as free; the kernel gives it back when asked for it.
        """
        free, total = self._call("cudaMemGetInfo")
        if self._call("cudaDeviceGetAttribute", self._cuda.cudaDeviceAttr.cudaDevAttrIntegrated, 0):
            free = max(free, available_memory(MEMORY_INFO.read_text(encoding="ascii")))
        return free, total

    def allocate(self, size: int) -> int:
        """Device memory, all zero. Raises :class:`DeviceError` if there is too little."""
        pointer = int(self._call("cudaMalloc", size))
        self._call("cudaMemset", pointer, 0, size)
        return pointer

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> int:
        """Host memory that the device copies from and to while the host goes on."""
        return int(self._call("cudaMallocHost", size))

    def free_pinned(self, pointer: int) -> None:
        """Give pinned host memory back."""
        self._call("cudaFreeHost", pointer)

    def stream(self) -> int:
        """A new stream."""
        return int(self._call("cudaStreamCreate"))

    def destroy_stream(self, stream: int) -> None:
        """End a stream."""
        self._call("cudaStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Until all of a stream's work is done."""
        self._call("cudaStreamSynchronize", stream)

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Copy from pinned host memory, in the stream's order."""
        self._call("cudaMemcpyAsync", device, host, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Copy to pinned host memory, in the stream's order."""
        self._call("cudaMemcpyAsync", host, device, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy within device memory, in the stream's order."""
        self._call("cudaMemcpyAsync", target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream)

    def event(self) -> Any:
        """A new event: a mark in a stream's work that keeps the time."""
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: int) -> None:
        """Have the device note the time when the stream's work so far is done."""
        self._call("cudaEventRecord", event, stream)

    def seconds_between(self, start: Any, end: Any) -> float:
        """From one recorded event to a later one, both over: by the device's clock, to half a microsecond."""
        return float(self._call("cudaEventElapsedTime", start, end)) / 1e3

    def destroy_event(self, event: Any) -> None:
        """End an event."""
        self._call("cudaEventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        """From here on work is recorded, not done."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        """What was recorded, to be launched as often as wanted."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Do what was recorded."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Free a recording."""
        self._call("cudaGraphExecDestroy", graph)


def available_memory(info: str) -> int:
    """Bytes that the kernel could give, from the text of ``/proc/meminfo``: free ones and most of the page cache."""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    return 1024 * int(fields["MemAvailable"].removesuffix("kB"))


def open_cuda() -> Cuda:
    """CUDA on this machine. Raises :class:`DeviceError` if the package, the driver or a GPU is missing."""
    try:
        module = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        detail = "" if isinstance(error, ModuleNotFoundError) else f" or does not load ({error})"
        raise DeviceError(f"cuda-bindings is not installed{detail}; {INSTALL}.") from None
    return Cuda(module)
