"""Layout of DequantizeLinear: round trips, and the values that ONNX's own operator computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fusion_edge.quant.dequantize_linear import from_dequantize_linear, to_dequantize_linear
from fusion_edge.quant.formats import PER_CHANNEL, WeightFormat
from fusion_edge.quant.packing import Packed, dequantize, quantize


@st.composite
def packed(draw: st.DrawFn) -> tuple[Packed, WeightFormat, int]:
    """Draw packed rows, their format and their number of inputs."""
    if draw(st.booleans()):
        fmt = WeightFormat("int4", draw(st.sampled_from([32, 64, 128])))
        rows, inputs = 2 * draw(st.integers(1, 6)), fmt.group_size * draw(st.integers(1, 3))
    else:
        fmt = WeightFormat(draw(st.sampled_from(["int8", "fp8"])), PER_CHANNEL)
        rows, inputs = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponent = draw(st.sampled_from([0, 9]))  # e^9 times the largest normal number is in the range of every format
    spread = np.exp(generator.uniform(-exponent, exponent, (rows, 1)))
    return quantize((generator.normal(size=(rows, inputs)) * spread).astype(np.float32), fmt), fmt, inputs


@given(packed())
@settings(max_examples=60, deadline=None)
def test_inverse(one: tuple[Packed, WeightFormat, int]) -> None:
    stored, fmt, inputs = one
    values, scales = to_dequantize_linear(stored, fmt, inputs)
    back = from_dequantize_linear(values, scales, fmt)
    assert np.array_equal(back.values, stored.values)
    assert np.array_equal(back.scales, stored.scales)
    assert back.zero_points is None


@given(packed())
@settings(max_examples=40, deadline=None)
def test_matches_onnx_operator(one: tuple[Packed, WeightFormat, int]) -> None:
    """The operator's values equal those of the packed layout bit for bit: each is one float32 multiplication."""
    stored, fmt, inputs = one
    values, scales = to_dequantize_linear(stored, fmt, inputs)
    expected = dequantize(stored, fmt, inputs)
    if fmt.bits == 4:
        actual = operator(values, scales, TensorProto.INT4, (inputs, len(expected)), fmt.block_size).T
    else:
        kind = TensorProto.FLOAT8E4M3FN if fmt.kind == "fp8" else TensorProto.INT8
        actual = operator(values, scales, kind, expected.shape, block_size=0)
    assert np.array_equal(actual, expected)


def operator(
    values: npt.NDArray[np.uint8], scales: npt.NDArray[np.floating], kind: int, shape: tuple[int, ...], block_size: int
) -> npt.NDArray[np.float32]:
    """Compute DequantizeLinear along axis 0. The bytes of ``values`` are those of a data file."""
    weight = helper.make_tensor("values", kind, shape, values.tobytes(), raw=True)
    scale = helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.astype(np.float32).tobytes(), raw=True)
    attributes: dict[str, Any] = {"block_size": block_size} if block_size else {}
    node = helper.make_node("DequantizeLinear", ["values", "scales"], ["result"], axis=0, **attributes)
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "one", [], [result], [weight, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: Any = session.run(None, {})
    array: npt.NDArray[np.float32] = outputs[0]
    return array
