"""Memory that the process and the GPU take."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from fusion_edge.benchmarks.latency.machine.nvidia import Gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT, Sampler, byte_count, fields

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
LARGEST_COUNT = 600
INTERVAL = 0.1


def resident() -> int:
    """Bytes of the process that are in memory now."""
    return byte_count(fields(STATUS)["VmRSS"])


def peak() -> int:
    """The most bytes that were in memory at once, since the process began or :func:`reset_peak`."""
    return byte_count(fields(STATUS)["VmHWM"])


def reset_peak() -> bool:
    """Let :func:`peak` count from now on; whether the kernel does that (``clear_refs`` in ``man 5 proc``)."""
    try:
        RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def device_memory(gpu: Gpu, root: Path = ROOT) -> int | None:
    """Bytes in use on the GPU, by whomever; on a Jetson of the memory that it shares with the host.

    There files that were read do not count: the kernel gives their room back when asked for it.
    """
    if not gpu.is_integrated:
        return gpu.used_memory()
    info = fields(root / "proc/meminfo")
    return byte_count(info["MemTotal"]) - byte_count(info["MemAvailable"])


class Timeline:
    """Bytes over time, at most :data:`LARGEST_COUNT` pairs."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []
        """Seconds and bytes."""
        self.largest = 0

    def add(self, seconds: float, size: int) -> bool:
        """A list that is full keeps every second pair; whether it was."""
        is_full = len(self.pairs) >= LARGEST_COUNT
        if is_full:
            del self.pairs[1::2]
        self.largest = max(self.largest, size)
        self.pairs.append((seconds, float(size)))
        return is_full


class MemoryRecorder(Sampler):
    """Context manager that records memory over time: of the process, and of a GPU if there is one that tells."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        super().__init__(INTERVAL)
        self.process, self.device = Timeline(), Timeline()
        self._gpu = gpu
        self._is_peak_its_own = False

    def __enter__(self) -> MemoryRecorder:
        self._is_peak_its_own = reset_peak()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if self._is_peak_its_own:  # it may have been between two samples; the kernel's count may lag behind them
            self.process.largest = max(self.process.largest, peak())

    def sample(self, seconds: float) -> None:
        """Record. When a list is full, half as many samples come from then on."""
        if self.process.add(seconds, resident()):
            self.interval *= 2
        used = None if self._gpu is None else device_memory(self._gpu)
        if used is not None:
            self.device.add(seconds, used)
