"""Machines whose GPU, driver or bindings are missing or broken: every step says which. The environment may fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import NoReturn

import pytest
from fakes import fake_nvidia
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, RTX, FakeTensorRT
from fakes.on_fake_tensorrt import installed

from fusion_edge.benchmarks.acceptance import alignment, bundles, device, engine, environment, operator_steps
from fusion_edge.benchmarks.acceptance.engine import Target
from fusion_edge.benchmarks.acceptance.steps import FAIL, PASS, Outcome, SkippedStep, Workspace
from fusion_edge.benchmarks.acceptance.worker import run_task
from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.runtime.backends.cuda import INSTALL, Cuda
from fusion_edge.runtime.backends.tensorrt.library import INSTALL as INSTALL_TENSORRT
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.errors import DeviceError
from fusion_edge.runtime.system.jetson import Jetson

NO_GPU = "CUDA finds no GPU; check nvidia-smi."
MISSING = f"cuda-bindings is not installed; {INSTALL}."
BROKEN = f"cuda-bindings is not installed or does not load (libcudart.so.13: no such file); {INSTALL}."
OLD_DRIVER = "CUDA's cudaGetDeviceCount failed: CUDA driver version is insufficient for CUDA runtime version."
NANO = Jetson("NVIDIA Jetson Orin Nano Developer Kit", 7_650_000_000)


class BrokenBindings(MetaPathFinder):
    """Bindings that are installed and do not load."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "cuda.bindings.runtime":
            raise ImportError("libcudart.so.13: no such file")


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, FakeCuda())
        monkeypatch.setattr(sys.modules[name], "__path__", [], raising=False)
    monkeypatch.delitem(sys.modules, "cuda.bindings.runtime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [BrokenBindings(), *sys.meta_path])


def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(gpus=0))


def on_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise DeviceError(OLD_DRIVER)

    monkeypatch.setattr(device, "open_cuda", refuse)


def on_a_jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver either: /proc alone says what it is."""
    monkeypatch.setattr(device, "this_jetson", lambda: NANO)


def on_a_desktop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_gpu", fake_nvidia.gpu)


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


Change = Callable[[pytest.MonkeyPatch], None]
MACHINES: list[tuple[Change, Change, str]] = [
    (nowhere, without_a_gpu, f"There is no GPU: {NO_GPU}"),
    (nowhere, missing, f"There is no GPU: {MISSING}"),
    (on_a_desktop, missing, f"CUDA cannot use the GPU: {MISSING}"),
    (on_a_desktop, broken, f"CUDA cannot use the GPU: {BROKEN}"),
    (on_a_jetson, missing, f"CUDA cannot use the GPU: {MISSING}"),
    (on_a_jetson, broken, f"CUDA cannot use the GPU: {BROKEN}"),
    (on_a_jetson, on_an_old_driver, f"CUDA cannot use the GPU: {OLD_DRIVER}"),
]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, tmp_path, None, None)


@pytest.fixture(params=MACHINES, ids=lambda case: f"{case[0].__name__}-{case[1].__name__}")
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why this machine cannot use CUDA."""
    machine, bindings, reason = request.param
    machine(monkeypatch)
    bindings(monkeypatch)
    return str(reason)


def test_the_environment(reason: str, workspace: Workspace) -> None:
    """It passes only if there is no GPU, and has its facts in any case."""
    task = {
        "function": "fusion_edge.benchmarks.acceptance.environment:check",
        "arguments": {},
        "workspace": vars(workspace),
    }
    ended = run_task(task)
    if reason.startswith("There is no GPU"):
        assert ended["status"] == PASS
        assert ended["summary"].endswith(f" free. {reason}")
    else:
        assert ended["status"] == FAIL
        assert ended["summary"].startswith(f"{reason} ")
    assert ended["figures"]["cuda"] == reason
    assert ended["figures"]["memory"]["available"] > 0


def test_the_environment_of_a_working_gpu(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_jetson(monkeypatch)
    cuda = FakeCuda("8.7")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    outcome = environment.check(workspace)
    assert not outcome.is_failure
    assert outcome.figures["cuda"]["compute_capability"] == "8.7"
    assert "CUDA" not in outcome.summary
    assert "There is no GPU" not in outcome.summary


def test_a_context_that_the_gpu_refuses(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA finds the GPU, and cannot use it."""
    on_a_desktop(monkeypatch)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda("8.7"))

    def refuse(*_: object) -> NoReturn:
        raise DeviceError("CUDA's cudaMemGetInfo failed: all CUDA-capable devices are busy or unavailable.")

    monkeypatch.setattr(Cuda, "memory", refuse)
    outcome = environment.check(workspace)
    assert outcome.is_failure
    assert outcome.summary.startswith("CUDA cannot use the GPU: CUDA's cudaMemGetInfo failed: all CUDA-capable devices")


def test_every_skip_has_the_reason(reason: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT is installed, as on a Jetson, and no step says that it is not."""
    trt = FakeTensorRT(*FULL, FakeCuda("8.7"))
    for name, module in (("tensorrt", trt), ("tensorrt.plugin", trt.plugin), ("tensorrt_rtx", None)):
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(SkippedStep) as skipped:
        bundles.expect_gpu()
    assert str(skipped.value) == reason
    with pytest.raises(SkippedStep) as skipped:
        operator_steps.linear(workspace, "int4-128")
    said = str(skipped.value)
    if reason.startswith("There is no GPU"):
        rtx = INSTALL_TENSORRT["tensorrt-rtx"]
        assert said == f"{reason} Only TensorRT-RTX builds without one: tensorrt-rtx is not installed; {rtx}."
    else:
        assert said == reason
    found = device.find_cuda()
    assert isinstance(found, device.NoCuda)
    monkeypatch.setattr(operator_steps, "find_target", lambda: Target(Library(trt), "8.7", found))
    monkeypatch.setattr(tensorrt_plugins, "unsupported_reason", lambda *_: None)
    with pytest.raises(SkippedStep) as skipped:
        operator_steps.plugin(workspace, PLUGINS[0].operator, 1, 1)
    assert str(skipped.value) == reason


def test_engines_that_are_built_alone(reason: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TensorRT-RTX. The line says why they do not run."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRT(*RTX, FakeCuda()))
    monkeypatch.setattr(operator_steps, "build", lambda *_: engine.BuiltEngine(b"plan", ()))
    outcome = operator_steps.attention(workspace, 72)
    assert outcome.summary.endswith(f"; built with tensorrt_rtx 1.7.1.116 for 8.9, not run. {reason}")


def test_interpreted_kernels(reason: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "INTERPRETED", ((0, 3),))
    monkeypatch.setattr(alignment, "kernel_source", lambda *_: lambda *_: None)
    monkeypatch.setattr(alignment, "interpreted", lambda plugin, kernel, case: case.expected)
    outcome = alignment.check(workspace, PLUGINS[0].kernel)
    assert outcome.summary.endswith(f", interpreted. {reason}")


def test_without_tensorrt_on_a_working_gpu() -> None:
    trt = FakeTensorRT(*FULL, FakeCuda("8.7"))
    with installed(trt):
        sys.modules["tensorrt"] = None  # type: ignore[assignment]
        with pytest.raises(
            SkippedStep, match=r"^There is no TensorRT: TensorRT is not installed: tensorrt is not inst"
        ):
            engine.find_target()


def test_a_failed_outcome_keeps_its_figures(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome("facts", {"a": 1}, is_failure=True)
    monkeypatch.setattr(environment, "check", lambda _: outcome)
    task = {"function": f"{environment.__name__}:check", "arguments": {}, "workspace": vars(workspace)}
    assert run_task(task) == {"status": FAIL, "summary": "facts", "figures": {"a": 1}}
    monkeypatch.setattr(environment, "check", lambda _: replace(outcome, is_failure=False))
    assert run_task(task)["status"] == PASS
