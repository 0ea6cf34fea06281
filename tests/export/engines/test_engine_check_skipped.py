"""When ``fusion-build`` does not compare its engines with the CPU, and what it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.fake_tensorrt import FakeTensorRT
from support.compared_engines import STAGES, build, engines_of, fake, folders
from support.opset24 import needs_opset_24

from fusion_edge.export.engines import engine_check
from fusion_edge.export.engines.stage_outputs import StageRunner
from fusion_edge.runtime.backends.onnxruntime import backend as onnxruntime_backend
from fusion_edge.runtime.backends.onnxruntime import library as onnxruntime_library
from fusion_edge.runtime.bundle.engine_manifest import EngineCheck
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.errors import DeviceError, FusionError

pytestmark = needs_opset_24


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny"))


def unchecked(bundle: Path, trt: FakeTensorRT, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the reason that is printed and kept."""
    capsys.readouterr()
    assert build(trt, bundle, *options) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not compared with the CPU: "))
    reason = line.removeprefix("not compared with the CPU: ")
    is_final = reason.startswith("The CPU does not run the bundle: ")
    assert engines_of(bundle).check == EngineCheck(reason, (), is_final)
    assert cli_info.main([str(bundle)]) == 0
    assert f"  no: {reason}\n" in capsys.readouterr().out
    return reason


def test_not_wanted(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next build compares the engines without building them."""
    trt = fake()
    assert unchecked(bundle, trt, capsys, "--skip-comparison") == "--skip-comparison was given."
    assert trt.loaded == 0
    assert unchecked(bundle, trt, capsys, "--skip-comparison") == "--skip-comparison was given."
    built = len(trt.built)
    assert build(trt, bundle) == 0
    assert len(trt.built) == built
    assert [one.stage for one in engines_of(bundle).check.stages] == STAGES
    assert build(trt, bundle, "--skip-comparison") == 0
    assert [one.stage for one in engines_of(bundle).check.stages] == STAGES


def test_activations_of_4_bits(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is loaded or run, neither now nor by the next build."""
    monkeypatch.setattr(engine_check, "ACTIVATIONS_4_BIT", open_bundle(bundle).manifest.weights["llm.lm_head"])
    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", None)
    trt = fake()
    for _ in range(2):
        reason = unchecked(bundle, trt, capsys)
        assert reason.startswith("Activations in nvfp4 have 4 bits, so right engines may differ from the CPU as wrong ")
    assert trt.loaded == 0


def test_no_gpu(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = unchecked(bundle, fake(gpus=0), capsys, "--device=8.6")
    assert reason == "CUDA finds no GPU; check nvidia-smi."


def test_another_gpu(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = unchecked(bundle, fake(), capsys, "--device=8.9")
    assert reason == "This machine's GPU has compute capability 8.6, and the engines are for another."


@pytest.mark.parametrize("version", [None, "1.23.2"])
def test_no_onnxruntime(
    bundle: Path, version: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Jetson may have none, or the last one for its Python 3.10."""

    def found() -> SimpleNamespace:
        if version is None:
            raise DeviceError("ONNX Runtime is not installed; run pip.")
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(onnxruntime_library, "find_onnxruntime", found)
    reason = unchecked(bundle, fake(), capsys)
    assert reason.startswith(
        "ONNX Runtime is not installed;" if version is None else "ONNX Runtime 1.23.2 has no opset 24"
    )


def test_a_device_without_room(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other programs may use its memory, so the engines are kept."""
    assert unchecked(bundle, fake(free=1 << 20), capsys).startswith("The engines need about 0.35 GB on the device (")


def test_a_device_whose_memory_is_taken_meanwhile(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is wrong with the engines; the next build compares them."""
    trt, run = fake(), StageRunner.run

    def take_memory(self: Any, backend: Any, given: Any = None) -> Any:
        monkeypatch.setattr(trt.cuda, "_free", 1 << 20)
        return run(self, backend, given)

    monkeypatch.setattr(StageRunner, "run", take_memory)
    assert unchecked(bundle, trt, capsys).startswith("The engines need about 0.35 GB on the device (")
    monkeypatch.setattr(StageRunner, "run", run)
    assert build(fake(), bundle) == 0
    assert engines_of(bundle).check.skipped is None


def test_a_machine_without_room(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = 3 * open_bundle(bundle).manifest.size
    monkeypatch.setattr(engine_check, "available_memory", lambda: needed - 1)
    reason = unchecked(bundle, fake(), capsys)
    assert reason.startswith("There is not enough memory to run the bundle on the CPU")
    monkeypatch.setattr(engine_check, "available_memory", lambda: needed)
    assert build(fake(), bundle) == 0
    assert engines_of(bundle).check.skipped is None


def test_a_device_that_fails_is_an_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its engines may be the reason."""
    trt = fake()
    trt.run_error = "an illegal memory access was encountered"
    assert build(trt, bundle) == 1
    assert "illegal memory access" in capsys.readouterr().err
    assert folders(bundle) == []


def test_a_cpu_without_memory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked once."""
    asked = []

    def no_memory(*_: object) -> None:
        asked.append(1)
        raise FusionError("There is not enough memory.")

    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", no_memory)
    for _ in range(2):
        reason = unchecked(bundle, fake(), capsys)
        assert reason == "The CPU does not run the bundle: There is not enough memory."
        assert len(asked) == 1
    unchecked(bundle, fake(), capsys, "--force")
    assert len(asked) == 2


def test_a_context_without_room_for_the_question(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    least = open_bundle(bundle).manifest.minimum_context
    reason = unchecked(bundle, fake(), capsys, f"--max-context={least}")
    assert re.match(
        rf"The CPU does not run the bundle: The prompt has \d+ tokens .* the context holds {least} ", reason
    )
