"""Attention of every head size builds with the real TensorRT-RTX: fused where there is a kernel, else decomposed."""

from __future__ import annotations

from types import ModuleType

import pytest
from onnx import ModelProto, TensorProto, helper

from fusion_edge.export.engines.decompositions import allow_decomposition

HEADS, ROWS = 2, 32
FUSED, OTHERS = (64, 128), (8, 264, 320)
"""Widths of heads that have a fused kernel in TensorRT-RTX 1.7.1 for compute capability 8.6, and that have none."""


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    module: ModuleType = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    return module


def attention(width: int) -> ModelProto:
    """Return a model of one masked Attention."""
    shape = [1, HEADS, ROWS, width]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("q", "k", "v")]
    mask = helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, 1, ROWS, ROWS])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT16, shape)
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["output"], scale=width**-0.5)
    graph = helper.make_graph([node], "attention", [*inputs, mask], [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def engine(trt: ModuleType, model: ModelProto) -> bytes | None:
    """Build an engine for compute capability 8.6. Return None if TensorRT-RTX cannot."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(memoryview(plan))


@pytest.mark.parametrize("width", OTHERS)
def test_heads_without_a_fused_kernel(trt: ModuleType, width: int) -> None:
    model = attention(width)
    assert engine(trt, model) is None
    allow_decomposition(model)
    assert engine(trt, model) is not None


@pytest.mark.parametrize("width", FUSED)
def test_heads_with_a_fused_kernel_stay_fused(trt: ModuleType, width: int) -> None:
    """The permission changes nothing in the engine."""
    model = attention(width)
    fused = engine(trt, model)
    assert fused is not None
    allow_decomposition(model)
    assert engine(trt, model) == fused
