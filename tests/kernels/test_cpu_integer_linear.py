"""Linear operators with 8-bit weights and calibrated 8-bit activations against a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper
from support.cpu_kernel_switches import needs_cpu_kernels
from support.linear_references import integer_linear, integer_tensors, one_step
from support.one_node import gelu, session_of

from fusion_edge.kernels.onnx_functions.linear import integer_matmul_function, integer_mlp_function
from fusion_edge.kernels.operators import INTEGER_LINEAR_INPUTS

Array = npt.NDArray[Any]
pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("each_tier")]
INTEGER_FUNCTIONS = {
    function.name: function
    for function in (
        integer_matmul_function(21),
        integer_matmul_function(21, gelu=True),
        integer_mlp_function(21),
    )
}


def integer_session(
    tensors: Mapping[str, Array], operator: str = "IntegerProduct", use_kernels: bool = True
) -> ort.InferenceSession:
    function = INTEGER_FUNCTIONS[operator]
    node = helper.make_node(function.name, list(function.input), ["y"], domain=function.domain)
    return session_of(node, function, tensors, use_kernels)


def mlp_tensors(generator: np.random.Generator, inputs: int, hidden: int, outputs: int, zero_point: int) -> Any:
    parts = {
        "up": integer_tensors(generator, inputs, hidden, 0.02, 128),
        "down": integer_tensors(generator, hidden, outputs, 0.02, zero_point),
    }
    return {f"{part}_{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@given(
    gelu_first=st.booleans(),
    rows=st.sampled_from([1, 3, 7, 8, 12, 25, 40]),
    inputs=st.integers(1, 700),
    outputs=st.integers(1, 90),
    scale=st.sampled_from([0.003, 0.01, 0.1]),
    zero_point=st.integers(0, 255),
    seed=st.integers(0, 2**32 - 1),
)
@example(False, 13, 257, 1600, 0.02, 128, 0)
@example(False, 1100, 700, 40, 0.02, 128, 2)  # several blocks of rows and inputs
@example(True, 33, 1200, 600, 0.02, 30, 3)
@example(True, 12, 4304, 64, 0.02, 10, 1)
@example(True, 4000, 64, 1600, 0.02, 10, 2)  # the result exceeds the caches: streaming stores
@example(False, 4000, 64, 1601, 0.02, 10, 3)  # the same, without the alignment that these need
@settings(max_examples=30, deadline=None)
def test_integer_matmul(
    gelu_first: bool, rows: int, inputs: int, outputs: int, scale: float, zero_point: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    tensors = integer_tensors(generator, inputs, outputs, scale, zero_point)
    x = generator.normal(size=(rows, inputs)).astype(np.float32)
    expected, most = integer_linear(tensors, gelu(x.astype(np.float64)) if gelu_first else x)
    operator = "GeluIntegerProduct" if gelu_first else "IntegerProduct"
    (actual,) = integer_session(tensors, operator).run(None, {"x": x[None]})
    # An error in the last bit of GELU may round to another integer.
    assert np.abs(actual[0] - expected).max() <= 2e-6 * most + gelu_first * one_step(tensors)


@given(
    rows=st.sampled_from([1, 3, 7, 8, 21]),
    inputs=st.integers(1, 300),
    hidden=st.integers(1, 300),
    outputs=st.integers(1, 90),
    zero_point=st.sampled_from([0, 10, 255]),
    seed=st.integers(0, 2**32 - 1),
)
@example(70, 1152, 4304, 96, 10, 0)
@settings(max_examples=30, deadline=None)
def test_integer_mlp(rows: int, inputs: int, hidden: int, outputs: int, zero_point: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tensors = mlp_tensors(generator, inputs, hidden, outputs, zero_point)
    x = generator.normal(size=(rows, inputs)).astype(np.float32)
    up, down = ({name: tensors[f"{part}_{name}"] for name in INTEGER_LINEAR_INPUTS} for part in ("up", "down"))
    expected, most = integer_linear(down, gelu(integer_linear(up, x)[0]))
    (actual,) = integer_session(tensors, "IntegerMlp").run(None, {"x": x[None]})
    assert np.abs(actual[0] - expected).max() <= 2e-6 * most + 2 * one_step(down)
    assert np.median(np.abs(actual[0] - expected)) <= 2e-6 * most  # these roundings are few


@pytest.mark.parametrize("operator", INTEGER_FUNCTIONS)
def test_inlined_functions_compute_the_same(operator: str) -> None:
    generator = np.random.default_rng(0)
    is_mlp = operator == "IntegerMlp"
    tensors = mlp_tensors(generator, 256, 64, 96, 9) if is_mlp else integer_tensors(generator, 256, 96, 0.02, 100)
    x = {"x": generator.normal(size=(1, 40, 256)).astype(np.float32)}
    own, theirs = (integer_session(tensors, operator, kernels).run(None, x)[0] for kernels in (True, False))
    assert np.abs(own - theirs).max() < (5e-3 if is_mlp else 1e-3) * np.abs(theirs).max()
    none = {"x": np.zeros((2, 0, 256), np.float32)}
    assert integer_session(tensors, operator).run(None, none)[0].shape == (2, 0, 96)


def test_quantization_of_ties_and_extreme_values() -> None:
    """QuantizeLinear rounds to even, saturates at 0 and 255, and rounds the quotient correctly."""
    scale = np.float32(0.0371)
    x = np.concatenate([
        [np.inf, -np.inf, 3e38, -3e38, 0, -0.0],
        (np.arange(-140, 140) + 0.5).astype(np.float32) * scale,  # some are ties, others are one bit off
        np.nextafter((np.arange(-140, 140) + 0.5).astype(np.float32) * scale, np.float32(0)),
    ]).astype(np.float32)  # fmt: skip
    tensors = integer_tensors(np.random.default_rng(0), 1, 1, float(scale), 128) | {"values": np.ones((1, 1), np.int8)}
    expected, _ = integer_linear(tensors, x[:, None])
    (actual,) = integer_session(tensors).run(None, {"x": x[None, :, None]})
    assert np.abs(actual[0] - expected).max() < one_step(tensors) / 100


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("values", r"values \[outputs, inputs\]"),
        ("scales", "a scale for each"),
        ("x_scale", "one scale and zero point"),
        ("x_zero_point", "one scale and zero point"),
        ("bias", "a bias for each"),
    ],
)
@pytest.mark.parametrize(
    ("operator", "prefix"),
    [("IntegerProduct", ""), ("GeluIntegerProduct", ""), ("IntegerMlp", "up_"), ("IntegerMlp", "down_")],
)
def test_wrong_tensor_sizes(name: str, named: str, operator: str, prefix: str) -> None:
    """The message comes from the kernel, so the kernel runs."""
    generator = np.random.default_rng(0)
    tensors = mlp_tensors(generator, 64, 8, 8, 100) if prefix else integer_tensors(generator, 64, 8, 0.02, 100)
    name = prefix + name
    one = integer_session(tensors | {name: np.resize(tensors[name], (*np.shape(tensors[name])[:-1], 3))}, operator)
    with pytest.raises(Exception, match=rf"{operator}: .*{named}"):
        one.run(None, {"x": np.zeros((1, 1, 64), np.float32)})
