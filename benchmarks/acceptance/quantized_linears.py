"""Quantized linear layers as the exporter writes them, with random weights and their results in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, helper

from fusion_edge.benchmarks.acceptance.comparison import ROUNDING
from fusion_edge.benchmarks.acceptance.engine import OperatorCase
from fusion_edge.benchmarks.acceptance.one_layer import one_layer_config
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.lowering.base import Settings
from fusion_edge.export.lowering.graph_builder import ONNX_TYPES, GraphBuilder, Part
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.tensorrt import OPSET, TensorRTOperations
from fusion_edge.quant import float4, float8
from fusion_edge.quant.formats import NVFP4_BLOCK, WeightFormat
from fusion_edge.runtime.bundle.graphs import GraphSpec, TensorSpec

INPUTS, OUTPUTS = 3072, 8192
"""Of a linear layer of the 3B model."""
OF_LLM, OF_VISION = "llm.lm_head", "vision.projector.up"
"""Linears whose graphs differ for weights with 8 bits."""
SIGMAS = 6
INPUT_SCALE = 2.0**-4
"""Scale of quantized activations, which quantization keeps."""
TENSOR_SCALE = 2.0**-10
"""Scale of a whole NVFP4 weight."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LinearForm:
    """A form of quantized linears in bundles."""

    linear: str
    """Name of a linear that has the form."""
    format: WeightFormat


FORMS: Mapping[str, LinearForm] = {
    name: LinearForm(linear, WeightFormat.parse(fmt))
    for name, linear, fmt in (
        ("int4-64", OF_LLM, "int4:64"),
        ("int4-128", OF_LLM, "int4:128"),
        ("int8", OF_VISION, "int8:channel"),
        ("int8-one-scale", OF_LLM, "int8:channel"),
        ("w8a8", OF_VISION, "w8a8"),
        ("fp8", OF_VISION, "fp8"),
        ("fp8-one-scale", OF_LLM, "fp8"),
        ("nvfp4", OF_LLM, "nvfp4"),
    )
}
"""By name of the step. ``one-scale``: one for all weights, then one for each output behind the GEMM."""


@dataclass(frozen=True)
class _Weight:
    """A random weight."""

    parts: Mapping[Part, Array]
    """Content of the graph's initializers, as in a data file."""
    values: Array
    """``[inputs,outputs]`` float64."""


def quantized_linear(form: str, rows: int, inputs: int, outputs: int) -> OperatorCase:
    """Return ``x [1,rows,inputs]`` times a weight in a form of :data:`FORMS`.

    If activations are quantized, too, x consists of values that quantization keeps.

    The tolerance covers weights rounded to float16 and, at worst, sums in float16: each rounds by 2^-11 of a partial
    sum, and tensor cores round once for 16 terms. Errors of random signs add up as a random walk.
    """
    fmt = FORMS[form].format
    rng = np.random.default_rng(0)
    x, weight = _activations(rng, fmt, rows, inputs), _weight(rng, fmt, inputs, outputs)
    builder = linear_graph(FORMS[form].linear, fmt, inputs, outputs)
    model = builder.model("", "0")
    _fill(model, builder, weight.parts)
    wide = x.astype(np.float64)
    walk = np.sqrt((wide**2) @ (weight.values**2)).max() * ROUNDING * np.sqrt(1 + inputs / 16)
    expected = {"y": (wide @ weight.values)[None]}
    return OperatorCase(model, {"x": x[None]}, expected, SIGMAS * float(walk), ranges={"positions": (rows, rows, rows)})


def linear_graph(name: str, fmt: WeightFormat, inputs: int, outputs: int) -> GraphBuilder:
    """Return the graph of a linear: ``x [1,positions,inputs]`` -> ``y``, float16. Its weights are planned."""
    x, y = (TensorSpec(one, "float16", (1, "positions", size)) for one, size in (("x", inputs), ("y", outputs)))
    builder = GraphBuilder(GraphSpec("linear", (x,), (y,)), OPSET)
    weight = Parameter(f"{name}.weight", "linear", (outputs, inputs), ())
    settings = Settings("tensorrt", "float16", 0, "float16", 1)
    linears = {name: Linear(weight, fmt)}
    operations = TensorRTOperations(one_layer_config(1, 1, 16), builder, {weight.name: weight}, linears, settings)
    operations.linear(operations.input("x"), name)
    builder.nodes[-1].output[0] = "y"  # an Identity would be one kernel more
    return builder


def _fill(model: ModelProto, builder: GraphBuilder, parts: Mapping[Part, Array]) -> None:
    """Replace the references to a data file by the content."""
    for tensor in model.graph.initializer:
        if (planned := builder.planned.get(tensor.name)) is not None:
            content = parts[planned.part].tobytes()
            assert len(content) == planned.nbytes, planned
            kind, shape = ONNX_TYPES[planned.dtype], planned.shape
            tensor.CopyFrom(helper.make_tensor(planned.name, kind, shape, content, raw=True))


def _activations(rng: np.random.Generator, fmt: WeightFormat, rows: int, inputs: int) -> npt.NDArray[np.float16]:
    """Return ``[rows,inputs]``. For NVFP4 each block has the largest FP4 value."""
    if fmt.kind == "w8a8":
        return (rng.integers(-8, 9, (rows, inputs)) * INPUT_SCALE).astype(np.float16)
    if fmt.kind == "nvfp4":
        codes = rng.integers(0, 16, (rows, inputs), np.uint8)
        codes[:, ::NVFP4_BLOCK] = float4.encode(np.array(float4.LARGEST, np.float32))
        return _scaled(codes, _block_scales(rng, rows, inputs, INPUT_SCALE)).astype(np.float16)
    return rng.standard_normal((rows, inputs), np.float32).astype(np.float16)


def _weight(rng: np.random.Generator, fmt: WeightFormat, inputs: int, outputs: int) -> _Weight:
    if fmt.kind == "nvfp4":
        return _nvfp4(rng, inputs, outputs)
    if fmt.bits == 4:
        return _int4(rng, fmt.block_size, inputs, outputs)
    encoded: Array
    codes: Array
    if fmt.kind == "fp8":
        encoded = float8.encode(100 * rng.standard_normal((outputs, inputs), np.float32))
        codes, largest_scale = float8.VALUES[encoded], 2.0**-12
    else:
        encoded = rng.integers(-127, 128, (outputs, inputs), np.int8)
        codes, largest_scale = encoded, 2.0**-10
    scales = (rng.uniform(0.5, 1, outputs) * largest_scale).astype(np.float16)
    parts: dict[Part, Array] = {"values": encoded, "scales": scales, "input_scale": np.array(INPUT_SCALE, np.float16)}
    return _Weight(parts, codes.T * scales.astype(np.float64))


def _int4(rng: np.random.Generator, group: int, inputs: int, outputs: int) -> _Weight:
    codes = rng.integers(-8, 8, (inputs, outputs), np.int8)
    scales = rng.uniform(0.5, 1, (inputs // group, outputs)).astype(np.float16) * np.float16(2.0**-6)
    parts: dict[Part, Array] = {"values": (codes[:, ::2] & 15) | codes[:, 1::2] << 4, "scales": scales}
    return _Weight(parts, codes * np.repeat(scales.astype(np.float64), group, axis=0))


def _nvfp4(rng: np.random.Generator, inputs: int, outputs: int) -> _Weight:
    codes, scales = rng.integers(0, 16, (outputs, inputs), np.uint8), _block_scales(rng, outputs, inputs, TENSOR_SCALE)
    parts: dict[Part, Array] = {
        "values": codes[:, ::2] | codes[:, 1::2] << 4,
        "scales": float8.encode((scales / TENSOR_SCALE).astype(np.float32)),
        "tensor_scale": np.array(TENSOR_SCALE, np.float32),
        "input_scale": np.array(INPUT_SCALE, np.float32),
    }
    return _Weight(parts, _scaled(codes, scales).T.astype(np.float64))


def _block_scales(rng: np.random.Generator, count: int, inputs: int, tensor_scale: float) -> Array:
    """Return scales of blocks ``[count,inputs/16]``, 0.5 to 1.875: E4M3 times ``tensor_scale``."""
    scales: Array = rng.choice(float8.VALUES[0x30:0x40], (count, inputs // NVFP4_BLOCK)) * np.float32(tensor_scale)
    return scales


def _scaled(codes: Array, scales: Array) -> Array:
    """Return the values of FP4 codes ``[count,inputs]`` with scales of blocks."""
    return (float4.VALUES[codes].reshape(*scales.shape, -1) * scales[:, :, None]).reshape(len(codes), -1)
