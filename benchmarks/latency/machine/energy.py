"""Energy meters: NVML's counter (GPU board), INA sensors (Jetson module), RAPL counters (x86 processor and memory).

Many systems let only root read RAPL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fusion_edge.benchmarks.latency.machine.nvidia import Gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT, BackgroundSampler, number, text

MIN_WINDOW = 5.0
"""Seconds. NVML's counter moves ten times per second; a shorter window has an error above 2%."""
INTERVAL = 0.1  # seconds

Reading = Callable[[], float | None]

WHOLE_MODULE = (
    # Rails whose sum is the power of a whole Jetson module. The first group with all rails present is used.
    ("VIN",),  # Thor's developer kit
    ("VDD_IN",),  # Orin Nano, Orin NX
    # AGX modules have high-voltage and 5 V inputs. The 5 V input feeds VDDQ_VDD2_1V8AO and so includes it.
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
)


@dataclass(frozen=True)
class EnergyUse:
    """Energy of a window of at least five seconds of decode steps from the case's context on, without a prefill."""

    source: str
    """``nvml``, or the names of the added sensors."""
    seconds: float
    joules: float
    joules_per_token: float


class EnergySource(ABC):
    """Adds up energy from readings at any interval."""

    def __init__(self, name: str, read: Reading) -> None:
        self.name = name
        self.joules = 0.0
        self.seconds = 0.0
        """Seconds between the first and the last reading."""
        self._read = read
        self._last: tuple[float, float] | None = None

    def take(self, now: float) -> None:
        """Read once. A failed reading is skipped; the next one covers its time."""
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
        """Return the joules between two readings."""


class EnergyCounter(EnergySource):
    """Source whose readings are joules since a fixed time."""

    def __init__(self, name: str, read: Reading, wraps_at: float | None = None) -> None:
        """``wraps_at``: joules at which the counter restarts at 0."""
        super().__init__(name, read)
        self._wraps_at = wraps_at

    def _between(self, seconds: float, last: float, value: float) -> float:
        return value - last if self._wraps_at is None else (value - last) % self._wraps_at


class PowerSensor(EnergySource):
    """Source whose readings are watts."""

    def _between(self, seconds: float, last: float, value: float) -> float:
        return seconds * (last + value) / 2


class EnergyMeter(BackgroundSampler):
    """Context manager that measures the energy of its block."""

    def __init__(self, gpu: Gpu | None, root: Path = ROOT) -> None:
        """``gpu``: the GPU that computes; None for a CPU."""
        super().__init__(INTERVAL)
        self._sources = sources(gpu, root)

    def sample(self, seconds: float) -> None:
        """Read every source."""
        for source in self._sources:
            source.take(seconds)

    def energy(self, tokens: int) -> EnergyUse | None:
        """Return the energy of ``tokens`` decode steps, after the block has ended.

        None if the machine reports no energy, or if the window is shorter than :data:`MIN_WINDOW`.
        """
        if not self._sources:
            return None
        seconds = min(source.seconds for source in self._sources)
        if seconds < MIN_WINDOW:
            return None
        name = " + ".join(source.name for source in self._sources)
        joules = sum(source.joules for source in self._sources)
        return EnergyUse(name, seconds, joules, joules / tokens)


def sources(gpu: Gpu | None, root: Path) -> list[EnergySource]:
    """Return the sources whose sum is the energy of a computation; empty if the machine has none."""
    if gpu is not None and gpu.joules() is not None:
        return [EnergyCounter("nvml", gpu.joules)]
    rails = _rails(root)
    for names in WHOLE_MODULE:
        if all(name in rails for name in names):
            return [PowerSensor(name, rails[name]) for name in names]
    return [] if gpu is not None else _rapl(root)


def _rails(root: Path) -> dict[str, Reading]:
    """Return readers of watts for each supply rail with a Texas Instruments sensor, by the rail's label."""
    rails: dict[str, Reading] = {}
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        chip = text(folder / "name")
        if chip == "ina3221":
            for path in folder.glob("in[123]_label"):
                channel = path.name[2]
                files = folder / f"in{channel}_input", folder / f"curr{channel}_input"
                rails[text(path) or ""] = partial(_watts, *files)
        elif chip == "ina238":  # on a Jetson: the carrier board's input
            rails["VIN"] = partial(_millionths, folder / "power1_input")
    return rails


def _rapl(root: Path) -> list[EnergySource]:
    """Return counters of each processor package and its memory that this process may read."""
    found: list[EnergySource] = []
    for folder in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        name, size = text(folder / "name") or "", number(folder / "max_energy_range_uj")
        read = partial(_millionths, folder / "energy_uj")
        if name.startswith(("package", "dram")) and size is not None and read() is not None:
            found.append(EnergyCounter(f"rapl {name}", read, wraps_at=size / 1e6))
    return found


def _watts(millivolts: Path, milliamperes: Path) -> float | None:
    volts, amperes = number(millivolts), number(milliamperes)
    return None if volts is None or amperes is None else volts * amperes / 1e6


def _millionths(path: Path) -> float | None:
    value = number(path)
    return None if value is None else value / 1e6
