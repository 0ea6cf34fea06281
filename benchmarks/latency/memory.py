"""Memory that the process and the GPU take."""

from __future__ import annotations

from pathlib import Path

from fusion_edge.benchmarks.latency.nvidia import Gpu
from fusion_edge.benchmarks.latency.sampler import Sampler
from fusion_edge.benchmarks.latency.system_files import ROOT, byte_count, fields

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


class MemoryRecorder(Sampler):
    """Context manager that records resident bytes over time."""

    def __init__(self) -> None:
        super().__init__(INTERVAL)
        self._values: list[tuple[float, int]] = []
        self._largest = 0
        self._is_peak_its_own = False

    def __enter__(self) -> MemoryRecorder:
        self._is_peak_its_own = reset_peak()
        return super().__enter__()

    def sample(self, seconds: float) -> None:
        """Record. A list that is full keeps every second value, and half as many come from then on."""
        if len(self._values) >= LARGEST_COUNT:
            del self._values[1::2]
            self.interval *= 2
        value = resident()
        self._largest = max(self._largest, value)
        self._values.append((seconds, value))

    @property
    def over_time(self) -> tuple[tuple[float, int], ...]:
        """Seconds since entry and resident bytes, at most :data:`LARGEST_COUNT` pairs."""
        return tuple(self._values)

    @property
    def peak(self) -> int:
        """Since entry: by the kernel's count, or the largest sample on a kernel that cannot count anew."""
        return peak() if self._is_peak_its_own else self._largest
