"""Joules, where the machine tells them.

A GPU's board by NVML's counter, a Jetson's module by the sensors of its power supplies, an x86 processor and its memory
by RAPL's counters, which many systems let only root read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fusion_edge.benchmarks.latency.machine.nvidia import Gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT, Sampler, number, text
from fusion_edge.benchmarks.latency.result import Energy

SHORTEST_WINDOW = 5.0
"""Seconds. NVML's counter moves ten times a second, so a shorter window is not known to 2 %."""
INTERVAL = 0.1

Reading = Callable[[], float | None]

WHOLE_MODULE = (
    # Rails whose sum is all that a Jetson takes; the first of which all are there.
    ("VIN",),  # Thor's developer kit
    ("VDD_IN",),  # Orin Nano, Orin NX
    # AGX modules have inputs of high voltage and of 5 V. VDDQ_VDD2_1V8AO is fed from the latter, so it is in there.
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
)


class Source(ABC):
    """What adds up energy from readings, however far apart they are."""

    def __init__(self, name: str, read: Reading) -> None:
        self.name = name
        self.joules = 0.0
        self.seconds = 0.0
        """Between the first and the last reading."""
        self._read = read
        self._last: tuple[float, float] | None = None

    def take(self, now: float) -> None:
        """Read once. A reading that fails is left out: the next one covers its time."""
        value = self._read()
        if value is None:
            return
        if self._last is not None:
            before, last = self._last
            self.seconds += now - before
            self.joules += self._between(now - before, last, value)
        self._last = now, value

    @abstractmethod
    def _between(self, seconds: float, last: float, value: float) -> float:
        """Joules between two readings."""


class Counter(Source):
    """Readings are joules since some time."""

    def __init__(self, name: str, read: Reading, wraps_at: float | None = None) -> None:
        """``wraps_at``: where the counter begins again at 0."""
        super().__init__(name, read)
        self._wraps_at = wraps_at

    def _between(self, seconds: float, last: float, value: float) -> float:
        return value - last if self._wraps_at is None else (value - last) % self._wraps_at


class Sensor(Source):
    """Readings are watts."""

    def _between(self, seconds: float, last: float, value: float) -> float:
        return seconds * (last + value) / 2


class EnergyMeter(Sampler):
    """Context manager that measures what is done inside."""

    def __init__(self, gpu: Gpu | None, root: Path = ROOT) -> None:
        """``gpu``: the one that computes; None for a CPU."""
        super().__init__(INTERVAL)
        self._sources = sources(gpu, root)

    def sample(self, seconds: float) -> None:
        """Read every source."""
        for source in self._sources:
            source.take(seconds)

    def energy(self, tokens: int) -> Energy | None:
        """Of so many tokens; None where the machine tells none, or was watched for less than :data:`SHORTEST_WINDOW`.

        After the end of the context.
        """
        if not self._sources:
            return None
        seconds = min(source.seconds for source in self._sources)
        if seconds < SHORTEST_WINDOW:
            return None
        name = " + ".join(source.name for source in self._sources)
        joules = sum(source.joules for source in self._sources)
        return Energy(name, seconds, joules, joules / tokens)


def sources(gpu: Gpu | None, root: Path) -> list[Source]:
    """What to add up for the energy of a computation; empty where the machine offers nothing."""
    if gpu is not None and gpu.joules() is not None:
        return [Counter("nvml", gpu.joules)]
    rails = _rails(root)
    for names in WHOLE_MODULE:
        if all(name in rails for name in names):
            return [Sensor(name, rails[name]) for name in names]
    return [] if gpu is not None else _rapl(root)


def _rails(root: Path) -> dict[str, Reading]:
    """Watts of each power supply that a chip of Texas Instruments watches, by its label."""
    rails: dict[str, Reading] = {}
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        chip = text(folder / "name")
        if chip == "ina3221":
            for path in folder.glob("in[123]_label"):
                channel = path.name[2]
                files = folder / f"in{channel}_input", folder / f"curr{channel}_input"
                rails[text(path) or ""] = partial(_watts, *files)
        elif chip == "ina238":  # on a Jetson it watches the carrier board's input
            rails["VIN"] = partial(_millionths, folder / "power1_input")
    return rails


def _rapl(root: Path) -> list[Source]:
    """Counters of each processor package and of its memory, if they may be read."""
    found: list[Source] = []
    for folder in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        name, size = text(folder / "name") or "", number(folder / "max_energy_range_uj")
        read = partial(_millionths, folder / "energy_uj")
        if name.startswith(("package", "dram")) and size is not None and read() is not None:
            found.append(Counter(f"rapl {name}", read, wraps_at=size / 1e6))
    return found


def _watts(millivolts: Path, milliamperes: Path) -> float | None:
    volts, amperes = number(millivolts), number(milliamperes)
    return None if volts is None or amperes is None else volts * amperes / 1e6


def _millionths(path: Path) -> float | None:
    value = number(path)
    return None if value is None else value / 1e6
