"""Facts about the machine, on file trees of a desktop, a cloud machine and a Jetson."""

from __future__ import annotations

import mmap
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_nvidia import FakeCuda, FakeNvml, gpu

from fusion_edge.benchmarks.latency.machine import info, memory, nvidia
from fusion_edge.benchmarks.latency.machine.info import ClockWatch, machine_info
from fusion_edge.benchmarks.latency.machine.memory import MemoryRecorder, device_memory

X86 = "processor\t: 0\nmodel name\t: AMD Ryzen 9\n\nprocessor\t: 1\nmodel name\t: AMD Ryzen 9\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    basics = {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 5000 kB\n", "proc/loadavg": "0.50 0.40 0.30 1/99 7\n"}
    for name, content in (basics | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def governors(*names: str) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    folder = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
    return {folder.format(core): f"{names[index % len(names)]}\n" for index, core in enumerate(cores)}


def command(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture(autouse=True)
def _no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_desktop(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": X86} | governors("powersave"))
    facts = machine_info(gpu(nvmlDeviceGetEnforcedPowerLimit=450_000), root)
    assert facts.processor == "AMD Ryzen 9"
    assert facts.memory == 8000 * 1024
    assert facts.cores == len(os.sched_getaffinity(0))
    assert facts.load_average == 0.5
    assert facts.governor == "powersave"
    assert facts.gpu == "NVIDIA RTX 4090"
    assert facts.power_mode == "GPU limited to 450 W"
    assert facts.throttled is None
    assert facts.versions["driver"] == "560.35.03"
    assert facts.versions["cuda driver"] == "12.6"
    assert facts.versions["numpy"] == np.__version__


def test_cloud_machine(tmp_path: Path) -> None:
    facts = machine_info(None, tree(tmp_path, {"proc/cpuinfo": X86}))
    assert (facts.governor, facts.gpu, facts.power_mode, facts.throttled) == (None, None, None, None)
    assert not {"driver", "cuda driver", "jetson linux", "tensorrt"} & set(facts.versions)


def test_orin_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path, "nvpmodel", "print('NV Fan Mode:quiet\\nNV Power Mode: MAXN_SUPER\\n2')", monkeypatch)
    board = {"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0", "etc/nv_tegra_release": RELEASE}
    root = tree(tmp_path, {"proc/cpuinfo": ARM} | board | governors("schedutil"))
    facts = machine_info(gpu(is_integrated=True), root)
    assert facts.processor == "NVIDIA Jetson Orin Nano Developer Kit"
    assert facts.power_mode == "MAXN_SUPER"
    assert facts.gpu == "Orin"
    assert facts.versions["jetson linux"] == "36.4.3"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_cores_with_different_governors(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": X86} | governors("schedutil", "performance"))
    assert machine_info(None, root).governor == "performance, schedutil"


@pytest.mark.parametrize(("cpuinfo", "name"), [(ARM, "implementer 0x41, part 0xd42"), ("", os.uname().machine)])
def test_processor_without_a_name(tmp_path: Path, cpuinfo: str, name: str) -> None:
    assert machine_info(None, tree(tmp_path, {"proc/cpuinfo": cpuinfo})).processor.endswith(name)


@pytest.mark.parametrize("script", ["import time; time.sleep(60)", "raise SystemExit('NVPM ERROR')"])
def test_tool_that_hangs_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(info, "COMMAND_TIMEOUT", 0.3)
    command(tmp_path, "nvpmodel", script, monkeypatch)
    started = time.perf_counter()
    assert machine_info(None, tree(tmp_path, {"proc/cpuinfo": X86})).power_mode is None
    assert time.perf_counter() - started < 5


def test_this_machine() -> None:
    facts = machine_info(None)
    assert facts.processor
    assert facts.memory > 1 << 28
    assert facts.gpu is None


def test_missing_gpu() -> None:
    assert nvidia._library("libno-such-library.so.1") is None
    assert nvidia.describe(FakeCuda(gpus=0), FakeNvml()) is None
    without_nvml = nvidia.describe(FakeCuda(), None)
    assert without_nvml is not None
    assert without_nvml.name == "NVIDIA RTX 4090"
    assert without_nvml.driver_version() is None
    assert without_nvml.joules() is None
    assert without_nvml.used_memory() is None
    assert without_nvml.throttle_reasons() == set()


def test_throttled_gpu() -> None:
    held = gpu(nvmlDeviceGetCurrentClocksThrottleReasons=0x01 | 0x04 | 0x20)
    assert held.throttle_reasons() == {"GPU at its power limit", "GPU too warm"}
    idle = gpu(nvmlDeviceGetCurrentClocksThrottleReasons=0x01)
    assert idle.throttle_reasons() == set()


def test_throttling_during_the_run_counts(tmp_path: Path) -> None:
    core = "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count"
    current = "sys/class/hwmon/hwmon3/oc3_event_cnt"
    tree(tmp_path, {core: "4\n", current: "37\n"})
    answers = {"nvmlDeviceGetCurrentClocksThrottleReasons": 0x01}
    found = gpu()
    with ClockWatch(replace(found, nvml=FakeNvml(answers)), tmp_path) as watch:
        assert watch.throttled is None
        tree(tmp_path, {current: "38\n"})
        answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x40
    assert watch.throttled == "GPU too hot: slowed by hardware, current above the board's limit"
    with ClockWatch(None, tmp_path) as watch:
        tree(tmp_path, {core: "5\n"})
    assert watch.throttled == "CPU too hot"


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    paths = [f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in cores]
    tree(tmp_path, dict.fromkeys(paths, "1500000\n") | {"sys/class/devfreq/17000000.gpu/cur_freq": "612000000\n"})
    answers = {"nvmlDeviceGetClockInfo(1)": 210}
    found = replace(gpu(), nvml=FakeNvml(answers))
    with ClockWatch(found, tmp_path) as watch:
        tree(tmp_path, {paths[-1]: "2000000\n"})
        answers["nvmlDeviceGetClockInfo(1)"] = 1980
    assert watch.clocks == {
        "processor": (1.5e9, 1.75e9, 2e9),
        "17000000.gpu": (6.12e8, 6.12e8, 6.12e8),
        "gpu": (2.1e8, 1.095e9, 1.98e9),
    }
    with ClockWatch(None, tmp_path / "nothing") as watch:
        pass
    assert watch.clocks == {}


def test_memory_of_the_process() -> None:
    size = 64 << 20
    before = memory.resident()
    with MemoryRecorder() as recorder:
        block = mmap.mmap(-1, size)
        block.write(b"\1" * size)
        time.sleep(0.15)
        held = memory.resident()
        block.close()
    assert held - before > 0.9 * size
    assert recorder.process.largest - before > 0.9 * size
    seconds, sizes = zip(*recorder.process.pairs, strict=True)
    assert len(sizes) >= 3
    assert sorted(seconds) == list(seconds)
    assert max(sizes) - sizes[0] > 0.9 * size


@pytest.mark.skipif(not memory.reset_peak(), reason="the kernel cannot reset the peak")
def test_peak_restarts() -> None:
    size = 64 << 20
    with mmap.mmap(-1, size) as block:  # memory that numpy frees may stay with the process
        block.write(b"\1" * size)
    before = memory.peak()
    with MemoryRecorder() as recorder:
        pass
    assert before - recorder.process.largest > 0.7 * size
    with mmap.mmap(-1, size) as block:
        block.write(b"\1" * size)
    assert memory.peak() - recorder.process.largest > 0.7 * size  # later memory does not count


def test_kernel_that_cannot_reset_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RESET", tmp_path / "missing" / "clear_refs")
    with MemoryRecorder() as recorder:
        pass
    assert recorder.process.largest == max(size for _, size in recorder.process.pairs)


def test_long_record_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_SAMPLES", 8)
    recorder = MemoryRecorder()
    first = recorder.interval
    for second in range(20):
        recorder.sample(float(second))
    seconds = [second for second, _ in recorder.process.pairs]
    assert len(seconds) <= 8
    assert seconds[0] == 0
    assert seconds[-1] == 19
    assert recorder.interval == 8 * first


def test_memory_of_a_gpu_over_time() -> None:
    answers = {"nvmlDeviceGetMemoryInfo": 5_000}
    with MemoryRecorder(replace(gpu(), nvml=FakeNvml(answers))) as recorder:
        answers["nvmlDeviceGetMemoryInfo"] = 9_000
        time.sleep(0.15)
        del answers["nvmlDeviceGetMemoryInfo"]  # a call that the driver fails
    assert recorder.device.largest == 9_000
    assert recorder.device.pairs[0] == (recorder.process.pairs[0][0], 5_000)
    assert len(recorder.device.pairs) < len(recorder.process.pairs)


def test_memory_of_a_gpu(tmp_path: Path) -> None:
    assert device_memory(gpu(nvmlDeviceGetMemoryInfo=5_000_000_000)) == 5_000_000_000
    assert device_memory(gpu(is_integrated=True), tree(tmp_path, {})) == 3000 * 1024
    assert device_memory(gpu()) is None
