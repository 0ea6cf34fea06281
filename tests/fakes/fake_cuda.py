"""A fake of ``cuda.bindings.runtime`` in host memory, with the functions that ``runtime/backends/cuda.py`` calls.

It is stricter than CUDA: a stream runs its work only when it is synchronized, memory is never reused, and undefined
behavior raises :class:`Misuse`, which fails the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Work = Callable[[], None]
ALIGNMENT = 256  # of every allocation
NEW, FREED = 0xCD, 0xDD
"""Bytes of new and of freed memory: NaN in float16."""


class Misuse(AssertionError):
    """A call with which CUDA would crash or give wrong results."""


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureInvalidated = 901


class CopyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class Attribute(IntEnum):
    cudaDevAttrIntegrated = 18
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


@dataclass
class Allocation:
    """An allocation of device memory, or of pinned host memory."""

    on_device: bool
    size: int
    memory: Bytes
    is_freed: bool = False


@dataclass(eq=False)
class Event:
    """A timestamp in a stream."""

    clock: float | None = None
    """Milliseconds; None until the stream reaches the event."""


@dataclass
class Stream:
    """A queue of work. A capture records the work in a graph instead."""

    pending: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    is_invalid: bool = False
    """Whether the capture contains a call that was refused."""


class FakeCuda(ModuleType):
    """The fake module. As in cuda-bindings, its functions return a tuple that starts with an error code."""

    def __init__(
        self, compute_capability: str = "8.6", free: int = 8 << 30, gpus: int = 1, is_integrated: bool = False
    ) -> None:
        """Describe the device: bytes that other programs leave, and whether it shares the memory of the host."""
        super().__init__("cuda.bindings.runtime")
        self.cudaError_t, self.cudaMemcpyKind = Error, CopyKind
        self.cudaStreamCaptureMode, self.cudaDeviceAttr = CaptureMode, Attribute
        self.calls: list[str] = []
        """Names of all called functions, in order."""
        self.failures: dict[str, Error] = {}
        """Error code by name of a function that fails."""
        self.allocations: dict[int, Allocation] = {}
        """Allocations by pointer, also freed ones."""
        self.streams: dict[int, Stream] = {}
        self.events: list[Event] = []
        """Events that are not destroyed."""
        self.clock = 0.0
        """Milliseconds. Only copies within the device advance it."""
        self.copy_rate = 1e6
        """Rate of these copies in bytes per millisecond."""
        self.graphs: list[object] = []
        """Captured and executable graphs that are not destroyed."""
        self._capability = compute_capability
        self._free, self._gpus, self._is_integrated = free, gpus, is_integrated

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("cuda") and name[4:5].isupper() and callable(value) and not isinstance(value, type):
            self.calls.append(name)
            if name in self.failures:
                return lambda *_: (self.failures[name], *[None] * (name in GIVE_RESULTS))
        return value

    # Checks for tests ------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Allocated device bytes."""
        return sum(one.size for one in self.allocations.values() if one.on_device and not one.is_freed)

    def check_all_freed(self) -> None:
        """Raise :class:`Misuse` if memory, a stream, an event or a graph is left."""
        left = [hex(pointer) for pointer, one in self.allocations.items() if not one.is_freed]
        if left or self.streams or self.events or self.graphs:
            kept = f"streams {list(self.streams)}, events {self.events}, graphs {self.graphs}"
            raise Misuse(f"Left: memory at {left}, {kept}.")

    def view(self, pointer: int, size: int, on_device: bool = True) -> Bytes:
        """Return memory as bytes. Raise :class:`Misuse` unless all of it is in one allocation."""
        for start, one in self.allocations.items():
            if start <= pointer < start + max(one.size, 1):
                kind = "device" if on_device else "host"
                if one.is_freed:
                    raise Misuse(f"{kind} memory at {pointer:#x} is used after it was freed.")
                if one.on_device != on_device:
                    raise Misuse(f"Memory at {pointer:#x} is not {kind} memory.")
                if pointer + size > start + one.size:
                    raise Misuse(
                        f"{size} bytes at {pointer:#x}, {pointer - start} bytes into an allocation of {one.size}."
                    )
                return one.memory[pointer - start : pointer - start + size]
        raise Misuse(f"There is no memory at {pointer:#x}.")

    def enqueue(self, stream: int, work: Work) -> None:
        """Append work to a stream, or to the graph that it captures."""
        one = self.streams[stream]
        (one.pending if one.captured is None else one.captured).append(work)

    def is_capturing(self, stream: int) -> bool:
        return self.streams[stream].captured is not None

    # CUDA's functions --------------------------------------------------------------------------------------------

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, f"{error.name} of the fake".encode()

    def cudaGetDeviceCount(self) -> tuple[Error, int]:
        return Error.cudaSuccess, self._gpus

    def cudaDeviceGetAttribute(self, attr: Attribute, device: int) -> tuple[Error, int]:
        major, minor = map(int, self._capability.split("."))
        values = {
            Attribute.cudaDevAttrComputeCapabilityMajor: major,
            Attribute.cudaDevAttrComputeCapabilityMinor: minor,
            Attribute.cudaDevAttrIntegrated: int(self._is_integrated),
        }
        return Error.cudaSuccess, values[attr]

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self._free - self.used, self._free

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        self._not_capturing("cudaMalloc")
        if size > self._free - self.used:
            return Error.cudaErrorMemoryAllocation, None
        return Error.cudaSuccess, self._allocate(size, on_device=True)

    def cudaMallocHost(self, size: int) -> tuple[Error, int]:
        self._not_capturing("cudaMallocHost")
        return Error.cudaSuccess, self._allocate(size, on_device=False)

    def cudaMemset(self, devPtr: int, value: int, count: int) -> tuple[Error]:
        self._not_capturing("cudaMemset")
        self.view(devPtr, count)[...] = value
        return (Error.cudaSuccess,)

    def cudaFree(self, devPtr: int) -> tuple[Error]:
        return self._release(devPtr, on_device=True)

    def cudaFreeHost(self, ptr: int) -> tuple[Error]:
        return self._release(ptr, on_device=False)

    def cudaStreamCreate(self) -> tuple[Error, int]:
        stream = 7001 + len(self.calls)
        self.streams[stream] = Stream()
        return Error.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        if self.is_capturing(stream):
            raise Misuse("A stream is destroyed during a capture.")
        del self.streams[stream]
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        self._not_capturing("cudaStreamSynchronize")
        pending, self.streams[stream].pending = self.streams[stream].pending, []
        for work in pending:
            work()
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: CopyKind, stream: int) -> tuple[Error]:
        on_device = {
            CopyKind.cudaMemcpyHostToDevice: (True, False),
            CopyKind.cudaMemcpyDeviceToHost: (False, True),
            CopyKind.cudaMemcpyDeviceToDevice: (True, True),
        }
        target_on_device, source_on_device = on_device[kind]

        def copy() -> None:
            self.view(dst, count, target_on_device)[...] = self.view(src, count, source_on_device)
            if kind == CopyKind.cudaMemcpyDeviceToDevice:
                self.clock += count / self.copy_rate

        self.view(dst, count, target_on_device)
        self.view(src, count, source_on_device)
        self.enqueue(stream, copy)
        return (Error.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: CopyKind, stream: int
    ) -> tuple[Error]:
        if width > min(dpitch, spitch):
            return (Error.cudaErrorInvalidValue,)
        for row in range(height):
            FakeCuda.cudaMemcpyAsync(
                self, dst + row * dpitch, src + row * spitch, width, kind, stream
            )  # no call of ours
        return (Error.cudaSuccess,)

    def cudaEventCreate(self) -> tuple[Error, Event]:
        event = Event()
        self.events.append(event)
        return Error.cudaSuccess, event

    def cudaEventRecord(self, event: Event, stream: int) -> tuple[Error]:
        if event not in self.events:
            raise Misuse("An event is recorded after it was destroyed.")
        event.clock = None

        def note() -> None:
            event.clock = self.clock

        self.enqueue(stream, note)
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: Event, end: Event) -> tuple[Error, float | None]:
        if start not in self.events or end not in self.events:
            return Error.cudaErrorInvalidResourceHandle, None
        if start.clock is None or end.clock is None:
            return Error.cudaErrorNotReady, None
        return Error.cudaSuccess, end.clock - start.clock

    def cudaEventDestroy(self, event: Event) -> tuple[Error]:
        if event not in self.events:
            raise Misuse("An event is destroyed twice.")
        self.events.remove(event)
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[Error]:
        self._not_capturing("cudaStreamBeginCapture")
        self.streams[stream].captured = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, list[Work] | None]:
        one = self.streams[stream]
        if one.captured is None:
            raise Misuse("Nothing is captured.")
        graph, is_invalid = one.captured, one.is_invalid
        one.captured, one.is_invalid = None, False
        if is_invalid:
            return Error.cudaErrorStreamCaptureInvalidated, None
        self.graphs.append(graph)
        return Error.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Error, list[Work]]:
        executable = list(graph)
        self.graphs.append(executable)
        return Error.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Error]:
        return self._destroy(graph)

    def cudaGraphExecDestroy(self, graphExec: list[Work]) -> tuple[Error]:
        return self._destroy(graphExec)

    def cudaGraphLaunch(self, graphExec: list[Work], stream: int) -> tuple[Error]:
        if all(graphExec is not one for one in self.graphs):
            raise Misuse("A graph is launched after it was destroyed.")
        for work in graphExec:
            self.enqueue(stream, work)
        return (Error.cudaSuccess,)

    def _not_capturing(self, function: str) -> None:
        if any(stream.captured is not None for stream in self.streams.values()):
            raise Misuse(f"{function} is called during a capture.")

    def _allocate(self, size: int, on_device: bool) -> int:
        whole = np.full(size + ALIGNMENT, NEW, np.uint8)
        skipped = -whole.ctypes.data % ALIGNMENT
        pointer = whole.ctypes.data + skipped
        self.allocations[pointer] = Allocation(on_device, size, whole[skipped : skipped + size])
        return pointer

    def _release(self, pointer: int, on_device: bool) -> tuple[Error]:
        self._not_capturing("cudaFree")
        one = self.allocations.get(pointer)
        if one is None or one.is_freed or one.on_device != on_device:
            raise Misuse(f"{pointer:#x} is no allocation of this kind, or is freed twice.")
        for stream in list(self.streams):
            self.cudaStreamSynchronize(stream)
        one.memory[...] = FREED  # not released: no other allocation may reuse the address
        one.is_freed = True
        return (Error.cudaSuccess,)

    def _destroy(self, graph: list[Work]) -> tuple[Error]:
        left = [one for one in self.graphs if one is not graph]
        if len(left) == len(self.graphs):
            raise Misuse("A graph is destroyed twice.")
        self.graphs = left
        graph.clear()  # its work refers to contexts
        return (Error.cudaSuccess,)


GIVE_RESULTS = {
    *("cudaGetDeviceCount", "cudaMalloc", "cudaMallocHost", "cudaStreamCreate", "cudaStreamEndCapture"),
    *("cudaGraphInstantiate", "cudaMemGetInfo", "cudaDeviceGetAttribute", "cudaEventCreate", "cudaEventElapsedTime"),
}
