"""Kernels of the recursive alignment: interpreted, and launched on a fake of CUDA's driver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_cuda_driver import MILLISECONDS, FakeCudaDriver
from support.paths import ROOT

from fusion_edge.benchmarks.acceptance import alignment, device
from fusion_edge.benchmarks.acceptance.device import DriverKernel
from fusion_edge.benchmarks.acceptance.steps import SkippedStep, Workspace
from fusion_edge.benchmarks.latency import peaks
from fusion_edge.kernels.tensorrt_plugins import PLUGINS, Plugin
from fusion_edge.kernels.triton.kernel_folder import CompiledKernel
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.errors import DeviceError, FusionError

WIDTH = 128
NO_CUDA = device.NoCuda("the test has none.", has_gpu=False)
KERNELS = tuple(plugin.kernel for plugin in PLUGINS)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of kernels for Orin. A process of its own compiles them: Triton interprets them in this one."""
    folder = tmp_path_factory.mktemp("kernels")
    module = "fusion_edge.kernels.triton.ahead_of_time"
    command = [sys.executable, "-m", module, "--output", str(folder), "--architecture=87", f"--width={WIDTH}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder


@pytest.fixture
def workspace(kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(alignment, "WIDTH", WIDTH)
    return Workspace(tmp_path, tmp_path, None, kernels)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """An Orin, small enough for the interpreter."""
    cuda = FakeCuda("8.7")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeCudaDriver(cuda))
    monkeypatch.setattr(alignment, "LAUNCHED", ((0, 3), (1, 1), (2, 3)))
    monkeypatch.setattr(alignment, "TIMED", (1, 1))
    monkeypatch.setattr(alignment, "TIMED_BYTES", 1)
    monkeypatch.setattr(peaks, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(peaks, "WARM_UP", 0.0)
    monkeypatch.setattr(device, "REPEATS", 1)
    return cuda


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_interpreted_without_a_gpu(
    name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "find_cuda", lambda: NO_CUDA)
    outcome = alignment.check(workspace, name)
    assert outcome.summary.startswith("sm_87, largest error ")
    assert outcome.summary.endswith(f", interpreted. {NO_CUDA}")
    errors = outcome.figures["largest_errors"]
    assert errors.keys() == {"0 rows", "1 rows", "6 rows"}
    assert max(errors.values()) < 0.01
    assert errors["6 rows"] > 0  # float16 rounds


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_launched_through_the_driver(name: str, workspace: Workspace, gpu: FakeCuda) -> None:
    outcome = alignment.check(workspace, name)
    figures = outcome.figures
    assert figures["interpreted"] is False
    assert figures["largest_errors"].keys() == {"0 rows", "1 rows", "6 rows"}
    assert "% of a copy's" in outcome.summary
    assert figures["seconds"] == pytest.approx(MILLISECONDS / 1e3)
    moved = figures["bandwidth"] * figures["seconds"]
    case = alignment.alignment_case(name, 1, 1, WIDTH)
    plugin = next(plugin for plugin in PLUGINS if plugin.kernel == name)
    assert moved == pytest.approx(alignment.bytes_moved(plugin, case))
    driver = sys.modules["cuda.bindings.driver"]
    assert isinstance(driver, FakeCudaDriver)
    assert driver.loaded == []
    gpu.check_all_freed()


def test_bytes_moved() -> None:
    """With 2 questions of 3 latents: 6 rows of 128 float16."""
    row, moved = 2 * WIDTH, {}
    for plugin in PLUGINS:
        moved[plugin.kernel] = alignment.bytes_moved(plugin, alignment.alignment_case(plugin.kernel, 2, 3, WIDTH))
    assert moved == {
        "context_attention": 2 * 6 * row + 2 * 3 * 9 * row,
        "add_layer_norm": 3 * 6 * row + 2 * row,
        "add_rows": 3 * 6 * row + 6 * 8,
    }


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.kernel)
def test_a_wrong_kernel_is_found(plugin: Plugin, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block too few."""
    monkeypatch.setattr(alignment, "find_cuda", lambda: NO_CUDA)
    launch = Plugin.launch

    def one_less(one: Plugin, *shapes: Sequence[int]) -> tuple[tuple[int, int], tuple[int, ...]]:
        (rows, heads), integers = launch(one, *shapes)
        return (max(rows - 1, 1), heads), integers

    monkeypatch.setattr(Plugin, "launch", one_less)
    with pytest.raises(FusionError, match=f"{plugin.kernel} of 6 rows: .* elements are wrong"):
        alignment.check(workspace, plugin.kernel)


def test_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "find_spec", lambda name: None)
    without = Workspace(tmp_path, tmp_path, None, None)
    with pytest.raises(SkippedStep, match="torch and triton not installed; compile the kernels elsewhere and pass --k"):
        alignment.kernel_source(without, "87")
    with pytest.raises(SkippedStep, match="There are no kernels for sm_75, only for 80, "):
        alignment.kernel_source(without, "75")


def test_the_driver_refuses(gpu: FakeCuda) -> None:
    with pytest.raises(DeviceError, match=r"^CUDA's cuModuleLoadData failed: CUDA_ERROR_INVALID_PTX of the fake\.$"):
        DriverKernel(CompiledKernel("k", "no PTX", 128, 0))
    with pytest.raises(DeviceError, match="cuModuleGetFunction failed"):
        DriverKernel(CompiledKernel("k", ".version 8.5\n.entry other()", 128, 0))


def test_cuda_is_expected(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(device.expect_cuda(), Cuda)
    assert isinstance(device.find_cuda(), Cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(gpus=0))
    assert str(device.find_cuda()) == "There is no GPU: CUDA finds no GPU; check nvidia-smi."
    with pytest.raises(SkippedStep, match=r"^There is no GPU: CUDA finds no GPU; check nvidia-smi\.$"):
        device.expect_cuda()
