"""Calls of CUDA, on a fake of NVIDIA's bindings."""

from __future__ import annotations

import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from fakes.fake_cuda import FakeCuda

from fusion_edge.runtime.backends import cuda
from fusion_edge.runtime.backends.cuda import Cuda, open_cuda
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


def test_the_page_cache_of_a_jetson_counts_as_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(INFO)
    monkeypatch.setattr(cuda, "MEMORY_INFO", tmp_path / "meminfo")
    assert Cuda(bindings(is_integrated=True)).memory() == (5_120_000_000, 8_000_000_000)
    assert Cuda(bindings(is_integrated=False)).memory() == (800_000_000, 8_000_000_000)


def test_memory_of_this_machine() -> None:
    text = cuda.MEMORY_INFO.read_text()
    assert 0 < kernel_available(text) < 1 << 50


def test_bindings_without_a_driver() -> None:
    def no_driver() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module = bindings(is_integrated=False)
    module.__dict__["cudaGetDeviceCount"] = no_driver
    with pytest.raises(DeviceError, match=r"^CUDA cannot be used: Failed to dlopen libcuda.so.1\.$"):
        Cuda(module)


def test_no_gpu() -> None:
    with pytest.raises(DeviceError, match=r"^CUDA finds no GPU; check nvidia-smi\.$"):
        Cuda(FakeCuda(gpus=0))


def test_no_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DeviceError, match=r"^cuda-bindings is not installed; pip install 'cuda-bindings==13"):
        open_cuda()
