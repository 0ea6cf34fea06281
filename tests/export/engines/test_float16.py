"""Float16 in place of INT8, in graphs and by ``fusion-build``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, Builder, FakeTensorRT, INetworkDefinition
from fakes.on_fake_tensorrt import build
from onnx import TensorProto, helper, numpy_helper

from fusion_edge.export import cli
from fusion_edge.export.engines import float16
from fusion_edge.export.engines.float16 import without_int8
from fusion_edge.runtime.bundle.engine_manifest import EnginePlatform
from fusion_edge.runtime.bundle.engines import open_engines, read_engines
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info

ROWS, INPUTS = 6, 8
MESSAGE = "Could not infer output types for operation: dequantize"


def quantized(folder: Path) -> onnx.ModelProto:
    """A w8a8 linear, its weights in ``folder``, and one with a scale for all weights that reads its result."""
    generator = np.random.default_rng(0)
    weights = {
        name: generator.integers(-128, 128, shape, dtype=np.int8)
        for name, shape in (("w", (ROWS, INPUTS)), ("v", (ROWS, ROWS)))
    }
    (folder / "g.data").write_bytes(weights["w"].tobytes() + weights["v"].tobytes())
    initializers = [
        numpy_helper.from_array(np.linspace(0.5, 1, ROWS).astype(np.float16) / 64, "s"),
        numpy_helper.from_array(np.array(2.0**-7, np.float16), "t"),
        numpy_helper.from_array(np.array(0.25, np.float16), "a"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    for name, offset in (("w", 0), ("v", ROWS * INPUTS)):
        proto = TensorProto(name=name, data_type=TensorProto.INT8, dims=weights[name].shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "g.data"), ("offset", offset), ("length", weights[name].size)):
            proto.external_data.add(key=key, value=str(value))
        initializers.append(proto)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "a", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0),
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "wt"], ["h"]),
        helper.make_node("DequantizeLinear", ["v", "t"], ["vd"]),
        helper.make_node("MatMul", ["h", "vd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, ROWS])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_weights_are_the_same_and_activations_exact(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    before = model.SerializeToString()
    result = without_int8(model, tmp_path)
    assert model.SerializeToString() == before
    assert result is not None
    onnx.checker.check_model(result)
    assert [node.op_type for node in result.graph.node] == ["Transpose", "MatMul", "MatMul"]
    assert {tensor.data_type for tensor in result.graph.initializer} == {TensorProto.FLOAT16}
    weights = np.fromfile(tmp_path / "g.data", np.int8).astype(np.float64)
    first = (
        weights[: ROWS * INPUTS].reshape(ROWS, INPUTS) * (np.linspace(0.5, 1, ROWS).astype(np.float16) / 64)[:, None]
    )
    second = weights[ROWS * INPUTS :].reshape(ROWS, ROWS) * 2.0**-7
    x = np.random.default_rng(1).normal(0, 1, (2, INPUTS)).astype(np.float16)
    session = ort.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": x})
    expected = x.astype(np.float64) @ first.astype(np.float16).T @ second.astype(np.float16)
    np.testing.assert_allclose(actual, expected, atol=4 * 2**-11 * np.abs(expected).max())


def test_models_without_int8_or_with_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(tmp_path)
    result = without_int8(model, tmp_path)
    assert result is not None
    assert without_int8(result, tmp_path) is None
    monkeypatch.setattr(float16, "LARGEST_MODEL", 2 * (ROWS * INPUTS + ROWS * ROWS) - 1)
    assert without_int8(model, tmp_path) is None


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """TensorRT that cannot build INT8."""
    trt = FakeTensorRT(*FULL, FakeCuda())
    whole = Builder.build_serialized_network

    def build_serialized_network(self: Builder, network: INetworkDefinition, config: object) -> object:
        has_int8 = any(tensor.data_type == TensorProto.INT8 for tensor in network.model.graph.initializer)
        trt.build_error = MESSAGE if has_int8 else None
        return whole(self, network, config)  # type: ignore[arg-type]

    monkeypatch.setattr(Builder, "build_serialized_network", build_serialized_network)
    return trt


def test_a_failed_build_is_repeated_in_float16(
    tiny_checkpoint: Path, tmp_path: Path, trt: FakeTensorRT, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--target=tensorrt", "--fp16"]
    assert cli.main([*command, "--rule=vision.*=int8:channel"]) == 0
    bundle = open_bundle(tmp_path / "b")
    assert build(bundle, trt, "--parts=1") == 0
    said = capsys.readouterr().err
    assert f"note: vision_encoder failed ({MESSAGE}); building it in float16 of the same weights\n" in said
    assert said.count("failed") == 1
    assert len(trt.built) == 3
    folder, engines = open_engines(bundle, EnginePlatform(*FULL, "8.6"))
    assert engines.float16_parts == {"vision_encoder.engine": MESSAGE}
    assert build(bundle, trt, "--parts=1") == 0
    kept = f"vision_encoder.engine has float16 in place of INT8, which failed: {MESSAGE}\n"
    assert kept in capsys.readouterr().out  # up to date, and the command still says so
    assert len(trt.built) == 3
    assert read_engines(folder) == engines
    assert cli_info.main([str(bundle.folder)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("In float16"))
    assert line.endswith(f"  vision_encoder.engine, because INT8 failed: {MESSAGE}")


@pytest.mark.parametrize(
    ("part", "options", "message", "ending"),
    [
        ("vision", ["--max-block=1GB"], MESSAGE, " If INT8 is the reason, fusion-export --vision fp16.\n"),
        ("vision", [], "Error Code 2: OutOfMemory (Requested size was 9.)", "fusion-export --vision fp16.\n"),
        ("vision", [], "Error Code 1: Cuda Runtime (out of memory)", "fusion-export --vision fp16.\n"),
        ("llm", [], MESSAGE, "or --workspace.\n"),
    ],
)
def test_failures_that_float16_does_not_follow(
    tiny_checkpoint: Path,
    tmp_path: Path,
    trt: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    options: list[str],
    message: str,
    ending: str,
) -> None:
    """With a limit of blocks, for other graphs than the vision encoder, and after memory ran out."""
    monkeypatch.setattr(f"{__name__}.MESSAGE", message)
    command = [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--target=tensorrt", "--fp16"]
    assert cli.main([*command, f"--rule={part}.*=int8:channel"]) == 0
    assert build(open_bundle(tmp_path / "b"), trt, "--parts=1", *options) == 1
    said = capsys.readouterr().err
    assert message.rstrip(".") in said
    assert "building it in float16" not in said
    assert said.endswith(ending)


def test_what_float16_cannot_replace(
    tiny_checkpoint: Path,
    tmp_path: Path,
    trt: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(float16, "LARGEST_MODEL", 0)
    capsys.readouterr()
    command = [str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--target=tensorrt", "--fp16"]
    assert cli.main([*command, "--rule=vision.*=int8:channel"]) == 0
    assert build(open_bundle(tmp_path / "b"), trt) == 1
    message = capsys.readouterr().err
    assert MESSAGE in message
    assert message.endswith("or --workspace. If INT8 is the reason, fusion-export --vision fp16.\n")
