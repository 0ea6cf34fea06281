"""CUDA through NVIDIA's ``cuda-bindings``: memory, copies, streams, events and graphs.

Every call is checked. Pointers are integers. No other file calls CUDA.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from fusion_edge.runtime.errors import DeviceError
from fusion_edge.runtime.system.resources import kernel_available

INSTALL = "pip install 'cuda-bindings==13.0.*' for CUDA 13, cuda-python==12.6.2.post1 for CUDA 12.6 (JetPack 6)"
MEMORY_INFO = Path("/proc/meminfo")


class Cuda:
    """CUDA on the current device of this process."""

    def __init__(self, module: ModuleType) -> None:
        """Wrap ``cuda.bindings.runtime``. Raise :class:`DeviceError` without a working GPU."""
        self._cuda = module
        if self._call("cudaGetDeviceCount") == 0:
            raise DeviceError("CUDA finds no GPU; check nvidia-smi.")

    def _call(self, function: str, *arguments: Any) -> Any:
        """Return a function's results without the error code. Raise :class:`DeviceError` for an error."""
        try:
            error, *results = getattr(self._cuda, function)(*arguments)
        except RuntimeError as failure:  # the bindings of CUDA 12.6 load the driver here
            raise DeviceError(f"CUDA cannot be used: {failure}.") from None
        if error != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(error)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise DeviceError(f"CUDA's {function} failed: {reason}.")
        return results[0] if len(results) == 1 else tuple(results)

    def compute_capability(self) -> str:
        """Return the GPU's compute capability, such as ``8.7``."""
        attributes = self._cuda.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
        return f"{major}.{minor}"

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes of the device. A Jetson's are those of the machine.

        CUDA does not count a Jetson's page cache as free, although the kernel gives it back on demand.
        """
        free, total = self._call("cudaMemGetInfo")
        if self._call("cudaDeviceGetAttribute", self._cuda.cudaDeviceAttr.cudaDevAttrIntegrated, 0):
            free = max(free, kernel_available(MEMORY_INFO.read_text(encoding="ascii")))
        return free, total

    def allocate(self, size: int) -> int:
        """Allocate zeroed device memory. Raise :class:`DeviceError` if there is too little."""
        pointer = int(self._call("cudaMalloc", size))
        self._call("cudaMemset", pointer, 0, size)
        return pointer

    def free(self, pointer: int) -> None:
        """Free device memory."""
        self._call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> int:
        """Allocate pinned host memory, for asynchronous copies."""
        return int(self._call("cudaMallocHost", size))

    def free_pinned(self, pointer: int) -> None:
        """Free pinned host memory."""
        self._call("cudaFreeHost", pointer)

    def stream(self) -> int:
        """Create a stream."""
        return int(self._call("cudaStreamCreate"))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Wait until a stream has done all its work."""
        self._call("cudaStreamSynchronize", stream)

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Enqueue a copy from pinned host memory."""
        self._call("cudaMemcpyAsync", device, host, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Enqueue a copy to pinned host memory."""
        self._call("cudaMemcpyAsync", host, device, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy within device memory."""
        self._call("cudaMemcpyAsync", target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """Enqueue a copy of rows of ``width`` bytes within device memory. A pitch is the bytes between two rows."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, stream)

    def event(self) -> Any:
        """Create an event, which timestamps a point in a stream."""
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: int) -> None:
        """Enqueue an event, which timestamps the end of the earlier work."""
        self._call("cudaEventRecord", event, stream)

    def seconds_between(self, start: Any, end: Any) -> float:
        """Return the seconds between two completed events, measured by the device to half a microsecond."""
        return float(self._call("cudaEventElapsedTime", start, end)) / 1e3

    def destroy_event(self, event: Any) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        """Start to capture a stream's work instead of running it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        """End the capture and return an executable graph."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph."""
        self._call("cudaGraphExecDestroy", graph)


def open_cuda() -> Cuda:
    """Open CUDA. Raise :class:`DeviceError` if the package, the driver or a GPU is missing."""
    try:
        module = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        detail = "" if isinstance(error, ModuleNotFoundError) else f" or does not load ({error})"
        raise DeviceError(f"cuda-bindings is not installed{detail}; {INSTALL}.") from None
    return Cuda(module)
