"""Decomposed operators compute the same as the originals in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, helper
from support.opset24 import needs_opset_24
from support.paths import GOLDEN

from fusion_edge.export import cli
from fusion_edge.export.engines.decompositions import OPSET, SINCE, decompose_operators, unsupported_operators
from fusion_edge.export.engines.graph_values import fix_dimension
from fusion_edge.runtime.bundle.reader import open_bundle

Array = npt.NDArray[Any]
pytestmark = needs_opset_24
OLDEST = (10, 3)
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}


def test_unsupported_operators_by_version() -> None:
    assert unsupported_operators(OLDEST) == unsupported_operators((10, 13)) == list(SINCE)
    assert unsupported_operators((10, 14)) == ["RMSNormalization", "RotaryEmbedding", "TensorScatter"]
    assert unsupported_operators((10, 16)) == unsupported_operators((11, 0)) == []


def computed(model: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: Any = session.run(None, feeds)
    return list(outputs)


def assert_same(operator: str, inputs: list[Array], groups: int = 1, **attributes: Any) -> None:
    """Return a model of one node, and the same decomposed."""
    names = [f"input_{i}" for i in range(len(inputs))]
    feeds = dict(zip(names, inputs, strict=True))
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in feeds.items()
    ]
    dtype = helper.np_dtype_to_tensor_dtype(inputs[0].dtype)
    node = helper.make_node(operator, names, ["result"], **attributes)
    graph = helper.make_graph([node], "one", described, [helper.make_tensor_value_info("result", dtype, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    (expected,) = computed(model, feeds)
    decompose_operators(model, list(SINCE), groups)
    assert model.graph.node[0].domain == "fusion_edge"
    assert model.opset_import[0].version == OPSET
    (actual,) = computed(model, feeds)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    assert difference <= TOLERANCE[inputs[0].dtype.name] * max(1, np.abs(expected).max())


def numbers(dtype: str, *shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(0, 1, shape).astype(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 7])
class TestOperators:
    def test_rms_normalization(self, dtype: str, rows: int) -> None:
        inputs = [30 * numbers(dtype, 1, rows, 24), numbers(dtype, 24)]
        assert_same("RMSNormalization", inputs, axis=-1, epsilon=1e-3, stash_type=1)

    def test_rotary_embedding(self, dtype: str, rows: int) -> None:
        positions = np.arange(3, 3 + rows)[None]
        inputs = [numbers(dtype, 1, 4, rows, 12), numbers(dtype, 16, 6), numbers(dtype, 16, 6), positions]
        assert_same("RotaryEmbedding", inputs)

    @pytest.mark.parametrize("start", [0, 5])
    def test_tensor_scatter(self, dtype: str, rows: int, start: int) -> None:
        inputs = [numbers(dtype, 1, 3, 12, 4), numbers(dtype, 1, 3, rows, 4), np.array([start])]
        assert_same("TensorScatter", inputs, axis=2)

    @pytest.mark.parametrize("groups", [1, 4])
    def test_attention(self, dtype: str, rows: int, groups: int) -> None:
        mask = np.arange(12) <= np.arange(rows)[:, None] + 2
        inputs = [numbers(dtype, 2, 8, rows, 6), *(numbers(dtype, 2, 8 // groups, 12, 6) for _ in range(2))]
        masks = np.broadcast_to(mask, (2, 1, rows, 12)).copy()
        assert_same("Attention", [*inputs, masks], groups, scale=0.3)


@pytest.fixture(scope="module", params=["FUSION-tiny-Phi", "FUSION-X-tiny-LLaMA"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bundle") / request.param
    assert cli.main([str(GOLDEN / request.param), "-o", str(folder), "--fp16", "--target", "tensorrt"]) == 0
    return folder


def older(folder: Path, name: str) -> ModelProto:
    """Return a decomposed graph of a bundle."""
    language = open_bundle(folder).manifest.model.language
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    fix_dimension(model, "capacity", 128)
    groups = language.heads // language.kv_heads if name == "llm" else 1
    decompose_operators(model, unsupported_operators(OLDEST), groups)
    return model


def test_all_unsupported_operators_are_decomposed(golden: Path) -> None:
    for name in ("vision_encoder", "llm"):
        model = older(golden, name)
        assert not {node.op_type for node in model.graph.node} & set(SINCE)
        imports = [opset for importing in (model, *model.functions) for opset in importing.opset_import]
        assert {opset.version for opset in imports if not opset.domain} == {OPSET}


def test_tensorrt_reads_decomposed_graphs(golden: Path) -> None:
    """TensorRT-RTX needs no functions, but expands them as an older TensorRT does."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    for name in ("vision_encoder", "llm"):
        logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse(older(golden, name).SerializeToString(), str(golden / "llm.onnx"))
        types = {network.get_layer(i).type for i in range(network.num_layers)}
        new = (trt.LayerType.KV_CACHE_UPDATE, trt.LayerType.ATTENTION_INPUT, trt.LayerType.ROTARY_EMBEDDING)
        assert not types & set(new)
        assert trt.LayerType.SOFTMAX in types
