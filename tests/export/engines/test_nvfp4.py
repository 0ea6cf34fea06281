"""NVFP4 in engines: TensorRT's operators, weights cut into pieces, and bundles built by TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto
from support.checkpoints import TINY
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration.samples import FEWEST
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.engines import cli as cli_build
from fusion_edge.export.engines.linear_pieces import cut_linears
from fusion_edge.export.engines.nvfp4 import DYNAMIC_QUANTIZE, TENSORRT, use_fp4
from fusion_edge.export.lowering.base import Settings
from fusion_edge.export.lowering.graph_builder import GraphBuilder
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.tensorrt import OPSET, TensorRTOperations
from fusion_edge.quant.nvfp4 import FORMAT
from fusion_edge.runtime.bundle.graphs import GraphSpec, TensorSpec

OUTPUTS, INPUTS, ROWS = 200, 64, 3
DATA = "g.data"


@pytest.fixture
def model(tmp_path: Path) -> ModelProto:
    """A graph of one linear as bundles have it, with its weights in ``tmp_path``."""
    sizes = (
        TensorSpec("x", "float16", (1, "positions", INPUTS)),
        TensorSpec("y", "float16", (1, "positions", OUTPUTS)),
    )
    builder = GraphBuilder(GraphSpec("g", sizes[:1], sizes[1:]), OPSET)
    weight = Parameter("llm.lm_head.weight", "linear", (OUTPUTS, INPUTS), ())
    linears = {"llm.lm_head": Linear(weight, FORMAT)}
    settings = Settings("tensorrt", "float16", 0, "float16", TINY.max_length)
    operations = TensorRTOperations(TINY, builder, {weight.name: weight}, linears, settings)
    operations.output(operations.linear(operations.input("x"), "llm.lm_head"), "y")
    content = np.random.default_rng(0).integers(0, 100, builder.data_bytes, dtype=np.uint8)
    for tensor in builder.planned.values():
        if not tensor.shape:
            content[tensor.offset : tensor.offset + 4] = np.array([2.0**-6], np.float32).view(np.uint8)
    (tmp_path / DATA).write_bytes(content.tobytes())
    return builder.model(DATA, "0")


def run(model: ModelProto, folder: Path, x: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    session = ort.InferenceSession(folder / "g.onnx", providers=["CPUExecutionProvider"])
    outputs: Any = session.run(None, {"x": x})
    result: npt.NDArray[np.float16] = outputs[0]
    return result


def test_operators_of_tensorrt(model: ModelProto) -> None:
    """Activations are quantized by TensorRT's operator; codes are FP4, their bytes and places unchanged."""
    before = {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}
    use_fp4(model)
    pair = ["DequantizeLinear", "DequantizeLinear", "Cast"]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == [*pair, DYNAMIC_QUANTIZE, *pair, "Transpose", "MatMul", "Identity"]
    assert len({node.name for node in model.graph.node}) == len(kinds)
    quantize = model.graph.node[3]
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in quantize.attribute}
    assert quantize.domain == TENSORRT
    assert attributes == {"axis": -1, "block_size": 16, "scale_type": TensorProto.FLOAT8E4M3FN}
    assert (TENSORRT, 1) in [(one.domain, one.version) for one in model.opset_import]
    changed = [tensor for tensor in model.graph.initializer if tensor.SerializeToString() != before[tensor.name]]
    assert [(tensor.name, tensor.data_type) for tensor in changed] == [("llm.lm_head.weight", TensorProto.FLOAT4E2M1)]


def test_other_graphs_do_not_change(tiny_tensorrt_bundle: Path) -> None:
    model = onnx.load(tiny_tensorrt_bundle / "llm.onnx", load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    use_fp4(model)
    assert model.SerializeToString(deterministic=True) == before


@needs_opset_24
def test_pieces(model: ModelProto, tmp_path: Path) -> None:
    """Ranges of rows of the data file, which compute the same."""
    x = np.random.default_rng(1).normal(0, 1, (1, ROWS, INPUTS)).astype(np.float16)
    expected = run(model, tmp_path, x)
    pieces = cut_linears(model, 128 * INPUTS * 2)
    assert not pieces.columns
    codes = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.UINT4]
    assert [list(tensor.dims) for tensor in codes] == [[128, INPUTS], [OUTPUTS - 128, INPUTS]]
    np.testing.assert_array_equal(run(model, tmp_path, x), expected)


def test_bundles_build(
    tiny_checkpoint: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With TensorRT-RTX for Blackwell, not compared with the CPU; refused for older GPUs."""
    pytest.importorskip("tensorrt_rtx")
    write_samples(tmp_path / "samples", FEWEST)
    rules = [f"--rule=alignment.layers.*.{name}=fp16" for name in ("context", "key", "value")]
    rules.append("--rule=*.layers.*=nvfp4")
    options = ["--fp16", *rules, f"--calibrate={tmp_path / 'samples'}", "--method=rtn"]
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--target=tensorrt", *options]) == 0
    assert cli_build.main([str(tmp_path / "b"), "--library=tensorrt-rtx", "--device=12.0", "--max-block=2MB"]) == 0
    assert "not compared with the CPU: Activations in nvfp4 have 4 bits, " in capsys.readouterr().out
    message = refused(cli_build.main, tmp_path / "b", "--library=tensorrt-rtx", "--device=8.9")
    assert " in nvfp4, which compute capability 8.9 does not have (10.0 and later do); export it with " in message
