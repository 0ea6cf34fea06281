"""Whether something held clocks down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fusion_edge.benchmarks.latency.nvidia import Gpu
from fusion_edge.benchmarks.latency.sampler import Sampler
from fusion_edge.benchmarks.latency.system_files import ROOT, number

INTERVAL = 0.5
COUNTERS: Mapping[str, str] = {
    # x86: one for each core and package.
    "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count": "CPU too hot",
    # Orin and Thor: low voltage, average and instantaneous current.
    "sys/class/hwmon/hwmon*/oc1_event_cnt": "supply voltage too low",
    "sys/class/hwmon/hwmon*/oc[23]_event_cnt": "current above the board's limit",
}


class ThrottleWatch(Sampler):
    """Context manager: what held clocks down in the meantime. Counters are compared, GPUs asked twice a second."""

    def __init__(self, gpu: Gpu | None, root: Path = ROOT) -> None:
        super().__init__(INTERVAL)
        self._gpu, self._root = gpu, root
        self._before = self._counts()
        self._of_gpu: set[str] = set()

    def sample(self, seconds: float) -> None:
        """Ask the GPU."""
        if self._gpu is not None:
            self._of_gpu |= self._gpu.throttle_reasons()

    @property
    def reasons(self) -> str | None:
        """Separated by commas; None if none was seen."""
        grown = {reason for reason, count in self._counts().items() if count > self._before[reason]}
        return ", ".join(sorted(grown | self._of_gpu)) or None

    def _counts(self) -> dict[str, int]:
        return {
            reason: sum(number(path) or 0 for path in self._root.glob(pattern)) for pattern, reason in COUNTERS.items()
        }
