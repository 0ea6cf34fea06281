"""Facts about the machine that runs a benchmark, and its clocks and throttling during the run.

Missing tools and files give None, never an error.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fusion_edge.benchmarks.latency.machine.nvidia import Gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT, BackgroundSampler, byte_count, fields, number, text
from fusion_edge.runtime.system.resources import usable_processors

COMMAND_TIMEOUT = 5.0  # seconds
DISTRIBUTIONS = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tokenizers",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "cuda-python",
)

THROTTLE_COUNTERS: Mapping[str, str] = {
    # x86: a counter per core and package.
    "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count": "CPU too hot",
    # Orin and Thor: low voltage, average and instantaneous current.
    "sys/class/hwmon/hwmon*/oc1_event_cnt": "supply voltage too low",
    "sys/class/hwmon/hwmon*/oc[23]_event_cnt": "current above the board's limit",
}
CLOCK_INTERVAL = 0.5  # seconds


@dataclass(frozen=True)
class MachineInfo:
    """Machine, its state at the start, and what happened to its clocks during the run."""

    processor: str
    cores: int
    """Number of cores that this process may use."""
    memory: int
    """Bytes."""
    governor: str | None
    """CPU frequency governor."""
    load_average: float
    """Of the last minute before the run."""
    gpu: str | None
    power_mode: str | None
    """As ``nvpmodel`` or NVML name it."""
    throttled: str | None
    """Reasons for reduced clocks during the run; None if there were none."""
    clocks: Mapping[str, tuple[float, ...]]
    """Lowest, median and highest clock during the run, in Hz: ``processor`` (its fastest core at each moment), ``gpu``,
    ``gpu memory``, and the devices that a Jetson's kernel lists as ``devfreq``, as far as the machine reports them."""
    system: str
    versions: Mapping[str, str]
    """Versions of Python, of the runtime libraries and of the driver."""


def machine_info(gpu: Gpu | None, root: Path = ROOT) -> MachineInfo:
    """Describe the machine in its present state; ``root`` holds its ``/proc``, ``/sys`` and ``/etc``.

    :class:`ClockWatch` gives ``clocks`` and ``throttled``.
    """
    return MachineInfo(
        processor=_processor(root),
        cores=usable_processors(root),
        memory=byte_count(fields(root / "proc/meminfo")["MemTotal"]),
        governor=_governor(root),
        load_average=float((root / "proc/loadavg").read_text(encoding="ascii").split()[0]),
        gpu=None if gpu is None else gpu.name,
        power_mode=_power_mode(gpu),
        throttled=None,
        clocks={},
        system=platform.platform(),
        versions=_versions(gpu, root),
    )


def _processor(root: Path) -> str:
    """Return a board's name, else an x86 processor's name, else an ARM core's implementer and part number."""
    info = fields(root / "proc/cpuinfo")
    name = text(root / "proc/device-tree/model") or info.get("model name")
    if not name and "CPU part" in info:
        name = f"{platform.machine()}, implementer {info.get('CPU implementer')}, part {info['CPU part']}"
    return name or platform.machine()


def _governor(root: Path) -> str | None:
    """Return the governors of the usable cores, separated by commas."""
    folders = (root / f"sys/devices/system/cpu/cpu{core}/cpufreq" for core in os.sched_getaffinity(0))
    names = {text(folder / "scaling_governor") for folder in folders}
    return ", ".join(sorted(name for name in names if name)) or None


def _power_mode(gpu: Gpu | None) -> str | None:
    named = re.search(r"NV Power Mode:\s*(\S+)", _output("nvpmodel", "-q"))
    if named:
        return named[1]
    limit = None if gpu is None else gpu.power_limit()
    return None if limit is None else f"GPU limited to {limit:.0f} W"


def _versions(gpu: Gpu | None, root: Path) -> dict[str, str]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text(root / "etc/nv_tegra_release") or "")
    versions["jetson linux"] = f"{release[1]}.{release[2]}" if release else None
    if gpu is not None:
        versions |= {"driver": gpu.driver_version(), "cuda driver": gpu.cuda_version}
    return {name: version for name, version in versions.items() if version}


def _output(*command: str) -> str:
    """Return a command's output; empty if the command is missing, fails or hangs."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.decode(errors="replace")


class ClockWatch(BackgroundSampler):
    """Context manager that reads clocks twice per second and the reasons for reduced ones."""

    def __init__(self, gpu: Gpu | None, root: Path = ROOT) -> None:
        super().__init__(CLOCK_INTERVAL)
        self._gpu, self._root = gpu, root
        self._before = self._counts()
        self._of_gpu: set[str] = set()
        self._clocks: dict[str, list[float]] = {}

    def sample(self, seconds: float) -> None:
        """Read every clock and the GPU's throttle reasons."""
        clocks = _clocks(self._root)
        if self._gpu is not None:
            self._of_gpu |= self._gpu.throttle_reasons()
            clocks |= self._gpu.clocks()
        for name, rate in clocks.items():
            self._clocks.setdefault(name, []).append(rate)

    @property
    def clocks(self) -> dict[str, tuple[float, ...]]:
        """Lowest, median and highest value of each clock, in Hz."""
        return {name: (min(rates), statistics.median(rates), max(rates)) for name, rates in self._clocks.items()}

    @property
    def throttled(self) -> str | None:
        """Throttle reasons, separated by commas; None if there were none."""
        grown = {reason for reason, count in self._counts().items() if count > self._before[reason]}
        return ", ".join(sorted(grown | self._of_gpu)) or None

    def _counts(self) -> dict[str, int]:
        return {
            reason: sum(number(path) or 0 for path in self._root.glob(pattern))
            for pattern, reason in THROTTLE_COUNTERS.items()
        }


def _clocks(root: Path) -> dict[str, float]:
    """Return the present clocks in Hz: of the fastest core, and of each ``devfreq`` device (a Jetson's GPU)."""
    cores = (root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in os.sched_getaffinity(0))
    fastest = max((number(path) or 0 for path in cores), default=0)
    clocks = {"processor": 1e3 * fastest} if fastest else {}
    for path in sorted(root.glob("sys/class/devfreq/*/cur_freq")):
        clocks[path.parent.name] = float(number(path) or 0)
    return clocks
