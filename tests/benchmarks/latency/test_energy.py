"""Energy from counters and sensors, on file trees of real machines, against values computed by hand."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
from fakes.fake_nvidia import gpu
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.benchmarks.latency.machine import energy
from fusion_edge.benchmarks.latency.machine.energy import EnergyCounter, EnergyMeter, PowerSensor, sources
from fusion_edge.benchmarks.latency.machine.nvidia import Gpu

Rails = dict[str, tuple[int, int]]
"""Millivolts and milliamperes by label."""


def ina3221(root: Path, number: int, rails: Rails) -> None:
    folder = root / f"sys/class/hwmon/hwmon{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text("ina3221\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        (folder / f"in{channel}_label").write_text(f"{label}\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")


def rapl(root: Path, zone: str, name: str, microjoules: int, size: int = 1_000_000_000) -> None:
    folder = root / f"sys/class/powercap/intel-rapl:{zone}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{size}\n")


def watts(found: list[energy.EnergySource]) -> float:
    """Return the power of constant sensors."""
    for source in found:
        source.take(0)
        source.take(2)
    assert all(source.seconds == 2 for source in found)
    return sum(source.joules for source in found) / 2


NANO: Rails = {"VDD_IN": (5000, 2000), "VDD_CPU_GPU_CV": (5000, 800), "VDD_SOC": (5000, 400)}


@pytest.mark.parametrize("computing", [None, gpu(is_integrated=True)])
def test_orin_nano_has_one_rail_for_the_module(tmp_path: Path, computing: Gpu | None) -> None:
    ina3221(tmp_path, 1, NANO)
    found = sources(computing, tmp_path)
    assert [source.name for source in found] == ["VDD_IN"]
    assert watts(found) == pytest.approx(10)


def test_agx_orin_adds_three_rails(tmp_path: Path) -> None:
    ina3221(tmp_path, 3, {"VDD_GPU_SOC": (20000, 500), "VDD_CPU_CV": (20000, 250), "VIN_SYS_5V0": (5000, 900)})
    ina3221(tmp_path, 4, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (4968, 80)})
    found = sources(gpu(is_integrated=True), tmp_path)
    assert [source.name for source in found] == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]
    assert watts(found) == pytest.approx(10 + 5 + 4.5)


def test_thor_has_a_sensor_at_its_input(tmp_path: Path) -> None:
    ina3221(tmp_path, 1, {"VDD_GPU": (20000, 500), "VDD_CPU_SOC_MSS": (20000, 250), "VIN_SYS_5V0": (5000, 900)})
    module = sources(gpu(is_integrated=True), tmp_path)
    assert watts(module) == pytest.approx(19.5)
    folder = tmp_path / "sys/class/hwmon/hwmon2"
    folder.mkdir()
    (folder / "name").write_text("ina238\n")
    (folder / "power1_input").write_text("27500000\n")
    kit = sources(gpu(is_integrated=True), tmp_path)
    assert [source.name for source in kit] == ["VIN"]
    assert watts(kit) == pytest.approx(27.5)


def test_incomplete_rails_are_ignored(tmp_path: Path) -> None:
    ina3221(tmp_path, 1, {"VDD_SOC": (5000, 400)})
    assert sources(None, tmp_path) == []


def test_gpu_energy_comes_from_nvml(tmp_path: Path) -> None:
    rapl(tmp_path, "0", "package-0", 0)
    found = sources(gpu(nvmlDeviceGetTotalEnergyConsumption=12_500), tmp_path)
    assert [source.name for source in found] == ["nvml"]
    assert found[0]._read() == 12.5
    assert sources(gpu(), tmp_path) == []  # the processor's energy is not the GPU's


def test_processor_and_memory_energy_come_from_rapl(tmp_path: Path) -> None:
    for zone, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "psys")):
        rapl(tmp_path, zone, name, 1_000_000)
    found = sources(None, tmp_path)
    assert [source.name for source in found] == ["rapl package-0", "rapl dram"]
    for source in found:
        source.take(0)
    rapl(tmp_path, "0", "package-0", 41_000_000)
    rapl(tmp_path, "0:1", "dram", 500_000)  # wrapped at 1,000 J
    for source in found:
        source.take(5)
    assert [source.joules for source in found] == pytest.approx([40, 999.5])


def test_unreadable_counters_are_ignored(tmp_path: Path) -> None:
    rapl(tmp_path, "0", "package-0", 1)
    counter = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    counter.unlink()
    counter.mkdir()  # unreadable even to root
    assert sources(None, tmp_path) == []


@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=20), st.floats(0, 100), st.data())
def test_failed_reading_does_not_change_constant_power(waits: list[float], power: float, data: st.DataObject) -> None:
    readings: list[float | None] = [power] * (len(waits) + 1)
    for lost in data.draw(st.sets(st.integers(1, len(waits) - 1))):
        readings[lost] = None
    sensor = PowerSensor("sensor", iter(readings).__next__)
    for now in accumulate(waits, initial=0.0):
        sensor.take(now)
    assert sensor.seconds == pytest.approx(sum(waits))
    assert sensor.joules == pytest.approx(power * sum(waits))


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20), st.integers(0, 999))
def test_wrapping_counter_loses_nothing(grown: list[int], first: int) -> None:
    value = first
    counter = EnergyCounter("counter", lambda: float(value % 1000), wraps_at=1000)
    counter.take(0)
    for second, joules in enumerate(grown, 1):
        value += joules
        counter.take(second)
    assert counter.joules == sum(grown)


def test_rising_power_is_integrated() -> None:
    sensor = PowerSensor("sensor", iter([0.0, 10.0, 20.0]).__next__)
    for second in (0, 1, 3):
        sensor.take(second)
    assert sensor.joules == 5 + 30


def test_energy_of_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ina3221(tmp_path, 1, NANO)
    with EnergyMeter(None, tmp_path) as meter:
        pass
    assert meter.energy(tokens=4) is None  # too short
    monkeypatch.setattr(energy, "MIN_WINDOW", 0.0)
    used = meter.energy(tokens=4)
    assert used is not None
    assert used.source == "VDD_IN"
    assert used.joules == pytest.approx(10 * used.seconds)
    assert used.joules_per_token == used.joules / 4
    meter.sample(6.0)
    used = meter.energy(tokens=4)
    assert used is not None
    assert used.joules == pytest.approx(60)


def test_machine_without_sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "MIN_WINDOW", 0.0)
    with EnergyMeter(None, tmp_path) as meter:
        pass
    assert meter.energy(tokens=1) is None
