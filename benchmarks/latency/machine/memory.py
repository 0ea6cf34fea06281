"""Memory of the process and of the GPU over time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fusion_edge.benchmarks.latency.machine.nvidia import Gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT, BackgroundSampler, byte_count, fields

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
MAX_SAMPLES = 600
INTERVAL = 0.1  # seconds


@dataclass(frozen=True)
class MemoryUse:
    """Bytes: resident in the process, or in use on the GPU beyond those in use before loading.

    ``loaded`` and ``load_peak`` describe the load, which all cases on a device share. The rest describes one case;
    memory that an allocator keeps from an earlier case counts.
    """

    loaded: int
    """After the load."""
    load_peak: int
    """Peak during the load."""
    steady: int
    """At the end of the case."""
    peak: int
    """Peak of the case, warm-up included: of ten samples per second, and for a process also the kernel's own peak
    where it can be reset."""
    over_time: tuple[tuple[float, ...], ...]
    """Pairs of seconds since the start of the case, and bytes."""


def resident() -> int:
    """Return the resident bytes of this process."""
    return byte_count(fields(STATUS)["VmRSS"])


def peak() -> int:
    """Return the peak resident bytes since the process started or since :func:`reset_peak`."""
    return byte_count(fields(STATUS)["VmHWM"])


def reset_peak() -> bool:
    """Restart :func:`peak`; return whether the kernel supports it (``clear_refs`` in ``man 5 proc``)."""
    try:
        RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def device_memory(gpu: Gpu, root: Path = ROOT) -> int | None:
    """Return the bytes in use on the GPU by all processes; on a Jetson those of the memory shared with the host.

    The page cache does not count on a Jetson: the kernel frees it on demand.
    """
    if not gpu.is_integrated:
        return gpu.used_memory()
    info = fields(root / "proc/meminfo")
    return byte_count(info["MemTotal"]) - byte_count(info["MemAvailable"])


class Timeline:
    """Bytes over time in at most :data:`MAX_SAMPLES` pairs."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []
        """Pairs of seconds and bytes."""
        self.largest = 0

    def add(self, seconds: float, size: int) -> bool:
        """Add a pair; return whether the list was full. A full list keeps every second pair."""
        is_full = len(self.pairs) >= MAX_SAMPLES
        if is_full:
            del self.pairs[1::2]
        self.largest = max(self.largest, size)
        self.pairs.append((seconds, float(size)))
        return is_full


class MemoryRecorder(BackgroundSampler):
    """Context manager that records memory over time: of the process, and of a GPU that reports it."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        super().__init__(INTERVAL)
        self.process, self.device = Timeline(), Timeline()
        self._gpu = gpu
        self._has_own_peak = False

    def __enter__(self) -> MemoryRecorder:
        self._has_own_peak = reset_peak()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if self._has_own_peak:  # a peak between two samples; the kernel's count may lag behind the samples
            self.process.largest = max(self.process.largest, peak())

    def sample(self, seconds: float) -> None:
        """Record both. A full list halves the sampling rate."""
        if self.process.add(seconds, resident()):
            self.interval *= 2
        used = None if self._gpu is None else device_memory(self._gpu)
        if used is not None:
            self.device.add(seconds, used)
