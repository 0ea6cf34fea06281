"""Calls of CUDA, on a fake of NVIDIA's bindings."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fusion_edge.runtime.backends import cuda
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.errors import DeviceError
from fusion_edge.runtime.system.resources import kernel_available

INFO = "MemTotal:        7802000 kB\nMemFree:          800000 kB\nMemAvailable:    5000000 kB\nSwapTotal: 0 kB\n"


class Status(IntEnum):
    cudaSuccess = 0


class Attribute(IntEnum):
    cudaDevAttrIntegrated = 18


def bindings(is_integrated: bool) -> ModuleType:
    module = ModuleType("cuda.bindings.runtime")
    calls = SimpleNamespace(
        cudaError_t=Status,
        cudaDeviceAttr=Attribute,
        cudaGetDeviceCount=lambda: (Status.cudaSuccess, 1),
        cudaMemGetInfo=lambda: (Status.cudaSuccess, 800_000_000, 8_000_000_000),
        cudaDeviceGetAttribute=lambda attribute, device: (Status.cudaSuccess, int(is_integrated)),
    )
    module.__dict__.update(vars(calls))
    return module


def test_a_jetson_may_have_what_files_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(INFO)
    monkeypatch.setattr(cuda, "MEMORY_INFO", tmp_path / "meminfo")
    assert Cuda(bindings(is_integrated=True)).memory() == (5_120_000_000, 8_000_000_000)
    assert Cuda(bindings(is_integrated=False)).memory() == (800_000_000, 8_000_000_000)


def test_memory_of_this_machine() -> None:
    text = cuda.MEMORY_INFO.read_text()
    assert 0 < kernel_available(text) < 1 << 50


def test_bindings_that_look_for_the_driver_late() -> None:
    def no_driver() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module = bindings(is_integrated=False)
    module.__dict__["cudaGetDeviceCount"] = no_driver
    with pytest.raises(DeviceError, match=r"^CUDA cannot be used: Failed to dlopen libcuda.so.1\.$"):
        Cuda(module)
