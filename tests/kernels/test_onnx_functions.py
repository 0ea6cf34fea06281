"""ONNX functions of the recursive alignment, run by ONNX Runtime, against the references."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from onnx import FunctionProto, helper

from fusion_edge.kernels.onnx_functions import alignment
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.runtime.bundle.config import ALIGNMENT_NORM_EPS

IR_VERSIONS = {21: 10, 24: 12}
"""IR version by opset (ONNX, docs/Versioning.md)."""
KNOWS_OPSET_24 = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)
OPSETS = [21, pytest.param(24, marks=pytest.mark.skipif(not KNOWS_OPSET_24, reason="ONNX Runtime is older"))]
DTYPES = ("float32", "float16")
TOLERANCE = {"float32": 4 * 2.0**-24, "float16": 4 * 2.0**-11}
"""Four roundings of values of about 1."""

Inputs = dict[str, npt.NDArray[np.generic]]


def run(function: FunctionProto, inputs: Inputs, opset: int) -> npt.NDArray[np.float64]:
    """Run a node of the function on ONNX Runtime. All axes but the last are dynamic."""
    values = []
    for name, value in inputs.items():
        axes = [*(f"{name}_{axis}" for axis in range(value.ndim - 1)), value.shape[-1]]
        shape: list[int | str | None] = [None, None] if name == "positions" else list(axes)
        values.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape))
    dtype = next(iter(inputs.values())).dtype
    output = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(dtype), [None, None, None])
    node = helper.make_node(function.name, list(inputs), ["y"], domain=DOMAIN)
    model = helper.make_model(
        helper.make_graph([node], "g", values, [output]),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        functions=[function],
        ir_version=IR_VERSIONS[opset],
    )
    (actual,) = ort.InferenceSession(model.SerializeToString()).run(None, inputs)
    assert actual.dtype == dtype
    assert list(inputs) == list(function.input)
    return np.asarray(actual, dtype=np.float64)


def exact(inputs: Inputs) -> dict[str, npt.NDArray[np.float64]]:
    """Return the inputs in float64."""
    return {name: value.astype(np.float64) for name, value in inputs.items()}


@pytest.mark.parametrize(("heads", "dim"), [(16, 4), (16, 192), (2, 6), (1, 1)])
@pytest.mark.parametrize("questions", [0, 1, 3])
@pytest.mark.parametrize("latents", [0, 1, 16, 36])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opset", OPSETS)
def test_context_attention(heads: int, dim: int, questions: int, latents: int, dtype: str, opset: int) -> None:
    generator = np.random.default_rng([heads, dim, questions, latents])
    width = heads * dim
    shapes = {"q": (questions, latents, width), "k": (1, latents, 9, width), "v": (1, latents, 9, width)}
    inputs: Inputs = {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    actual = run(alignment.context_attention_function(heads, dim, dtype, opset), inputs, opset)
    expected = alignment.context_attention_reference(**exact(inputs), heads=heads)
    # Scores are sums of head_dim products.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * (4 + np.sqrt(dim)))


@pytest.mark.parametrize("questions", [0, 1, 3])
@pytest.mark.parametrize("latents", [0, 1, 16])
@pytest.mark.parametrize("width", [2, 64, 3072])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opset", OPSETS)
def test_add_layer_norm(questions: int, latents: int, width: int, dtype: str, opset: int) -> None:
    generator = np.random.default_rng([questions, latents, width])
    rows = (questions, latents, width)
    shapes = {"x": rows, "residual": rows, "weight": (width,), "bias": (width,)}
    inputs: Inputs = {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    if width == 2:  # the norm of two nearly equal values would amplify the rounding of their sum
        inputs["x"] = np.tile(np.array([1, -1], dtype=dtype), (questions, latents, 1))
        inputs["residual"] = inputs["x"]
    actual = run(alignment.add_layer_norm_function(ALIGNMENT_NORM_EPS, opset), inputs, opset)
    expected = alignment.add_layer_norm_reference(**exact(inputs), epsilon=ALIGNMENT_NORM_EPS)
    # Mean and variance are float32 sums of a row, which ONNX Runtime 1.23 adds sequentially.
    tolerance, sums = TOLERANCE[dtype], 2.0**-24 * np.sqrt(width)
    np.testing.assert_allclose(actual, expected, rtol=tolerance + sums, atol=4 * tolerance + sums)


@pytest.mark.parametrize(("questions", "latents", "length"), [(1, 4, 9), (3, 5, 15), (2, 1, 40), (0, 4, 7), (1, 0, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("opset", OPSETS)
def test_add_rows(questions: int, latents: int, length: int, dtype: str, opset: int) -> None:
    generator = np.random.default_rng([questions, latents, length])
    rows = (questions, latents)
    inputs: Inputs = {
        "x": generator.normal(size=(1, length, 24)).astype(dtype),
        "positions": generator.permutation(length)[: questions * latents].reshape(rows),
        "latents": generator.normal(size=(*rows, 24)).astype(dtype),
        "update": generator.normal(size=(*rows, 24)).astype(dtype),
    }
    actual = run(alignment.add_rows_function(opset), inputs, opset)
    positions = np.asarray(inputs["positions"], dtype=np.int64)
    x, _, old, update = exact(inputs).values()
    expected = alignment.add_rows_reference(x, positions, old, update)
    others = [row for row in range(length) if row not in positions]
    np.testing.assert_array_equal(actual[0, others], expected[0, others])
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE[dtype] / 4, atol=0)
