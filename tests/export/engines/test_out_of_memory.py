"""Builds of the vision encoder that run out of memory: not built again in float16, which is larger."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, Builder, FakeTensorRT, INetworkDefinition
from fakes.fake_tensorrt_runtime import ILogger
from fakes.on_fake_tensorrt import build
from onnx import TensorProto

from fusion_edge.export import cli
from fusion_edge.export.engines import builder as engine_builder
from fusion_edge.export.engines import jetsons
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.system.jetson import ContiguousMemory, Jetson

WARNING, ERROR = ILogger.Severity.WARNING, ILogger.Severity.ERROR
NO_IMPLEMENTATION = (
    ERROR,
    "IBuilder::buildSerializedNetwork: Could not find any implementation for node {ForeignNode[/Unsqueeze.../Cast]}.",
)
CUDA_ERROR = (ERROR, "CUDA error 2 for 622329856-byte allocation.")
REQUESTED = (WARNING, "Requested amount of GPU memory (622329856 bytes) could not be allocated.")
DEFAULT_CMA = ContiguousMemory(4_194_304, 900, 250_000_000, 268_435_456)
NANO = Jetson("NVIDIA Jetson Orin Nano Developer Kit", 7_650_000_000)
AGX = Jetson("NVIDIA Jetson AGX Orin Developer Kit", 64_000_000_000)


@pytest.fixture
def bundle(tiny_checkpoint: Path, tmp_path: Path) -> Bundle:
    """A bundle whose vision encoder has 8 bits."""
    command = [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--target=tensorrt", "--fp16"]
    assert cli.main([*command, "--rule=vision.*=int8:channel"]) == 0
    return open_bundle(tmp_path / "b")


def failing(monkeypatch: pytest.MonkeyPatch, *messages: tuple[ILogger.Severity, str]) -> FakeTensorRT:
    """TensorRT whose builds of INT8 end with these messages."""
    trt = FakeTensorRT(*FULL, FakeCuda())
    whole = Builder.build_serialized_network

    def build_serialized_network(self: Builder, network: INetworkDefinition, config: object) -> object:
        if all(tensor.data_type != TensorProto.INT8 for tensor in network.model.graph.initializer):
            return whole(self, network, config)  # type: ignore[arg-type]
        for severity, message in messages:
            self._logger.log(severity, message)
        return None

    monkeypatch.setattr(Builder, "build_serialized_network", build_serialized_network)
    return trt


@pytest.mark.parametrize("here", [None, NANO, AGX])
def test_memory_ran_out(
    bundle: Bundle, here: Jetson | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_builder, "this_jetson", lambda: here)
    monkeypatch.setattr(jetsons, "contiguous_memory", lambda: DEFAULT_CMA)
    assert build(bundle, failing(monkeypatch, CUDA_ERROR, NO_IMPLEMENTATION)) == 1
    said = capsys.readouterr().err
    assert "building it in float16" not in said
    first = CUDA_ERROR[1].rstrip(".")
    assert f"cannot build vision_encoder for compute capability 8.6: {first}. Memory ran out" in said
    assert ("Add cma=950M to APPEND" in said) == (here is NANO)
    assert ("Build with --max-block 400MB" in said) == (here is NANO)


@pytest.mark.parametrize("before", [(), (REQUESTED,)])
def test_no_kernel_for_another_reason(
    bundle: Bundle,
    before: tuple[tuple[ILogger.Severity, str], ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No error says that memory ran out, so float16 may help."""
    assert build(bundle, failing(monkeypatch, *before, NO_IMPLEMENTATION)) == 0
    assert "; building it in float16 of the same weights" in capsys.readouterr().err


def test_a_failed_allocation_that_did_not_matter(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that was tried did not fit, and then INT8 failed for its own reason."""
    trt = failing(monkeypatch, REQUESTED, (ERROR, "Could not infer output types for operation: dequantize"))
    assert build(bundle, trt) == 0
    assert "; building it in float16 of the same weights" in capsys.readouterr().err
