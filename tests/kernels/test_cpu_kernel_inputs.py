"""Invalid and unusual inputs and attributes of the CPU kernels, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper
from support.attention_graphs import (
    Causal,
    cached_feeds,
    cached_model,
    causal_feeds,
    causal_model,
    multi_head_model,
    packed_model,
    session,
)
from support.cpu_kernel_switches import needs_cpu_kernels
from support.linear_references import integer_tensors
from support.one_node import session_of

from fusion_edge.kernels.onnx_functions.linear import integer_matmul_function
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

Array = npt.NDArray[Any]
SIZES = Causal(2, 2, 16, 16)
INT8 = Causal(2, 2, 16, 16, int8=True)
EXTREME = (0, -1, 2**31, 2**62, -(2**62), 2**63 - 1)

pytestmark = needs_cpu_kernels


def integer_matmul(tensors: Mapping[str, Array], use_kernels: bool = True) -> onnxruntime.InferenceSession:
    function = integer_matmul_function(21)
    node = helper.make_node(function.name, list(function.input), ["y"], domain=function.domain)
    return session_of(node, function, tensors, use_kernels)


def matmul_nbits(changed: Mapping[str, Any], **tensors: Array) -> onnxruntime.InferenceSession:
    """Return a session of 64 inputs in blocks of 32 and 4 outputs, with changed attributes and added tensors."""
    values: dict[str, Array] = {"values": np.ones((4, 2, 16), np.uint8), "scales": np.ones((4, 2), np.float32)}
    values |= tensors
    names = ["x", "values", "scales", *("zero_points" for _ in range("zero_points" in tensors))]
    attributes = {"K": 64, "N": 4, "bits": 4, "block_size": 32, "accuracy_level": 4, **changed}
    return session_of(helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes), None, values)


@pytest.mark.parametrize("empty", ["last_position", "total_length", "is_prefill"])
@pytest.mark.parametrize("int8", [False, True])
def test_empty_lengths(int8: bool, empty: str) -> None:
    model = cached_model(INT8) if int8 else causal_model(SIZES)
    feeds = cached_feeds(INT8, 4, 8, 1) if int8 else causal_feeds(SIZES, 4, 8, 1)
    if empty not in feeds:
        return  # only the int8 cache has is_prefill
    changed = _of_any_shape(model, empty)
    with pytest.raises(Exception, match=r"Attention: expected one value of (the last|the total|is_prefill)"):
        session(changed, cpu_kernels.library()).run(None, feeds | {empty: feeds[empty].ravel()[:0]})


def _of_any_shape(model: bytes, name: str) -> bytes:
    """Return ``model`` without the shape of an input, which ONNX Runtime would check before the kernel."""
    parsed = ModelProto.FromString(model)
    next(value for value in parsed.graph.input if value.name == name).type.tensor_type.ClearField("shape")
    return bytes(parsed.SerializeToString())


@pytest.mark.parametrize("total", [-1, 0, -(2**31), 2**31 - 1, 10, 20])
@pytest.mark.parametrize("last", [None, 0, -(2**31), 2**31 - 1])
def test_inconsistent_lengths(total: int, last: int | None) -> None:
    feeds = causal_feeds(SIZES, 4, 8, 1)
    last = max(total - 1, -(2**31)) if last is None else last
    wrong = {"total_length": np.array(total, np.int32), "last_position": np.array([last], np.int32)}
    with pytest.raises(Exception, match=r"GroupQueryAttention: .*(do not agree|expected cos and sin)"):
        session(causal_model(SIZES), cpu_kernels.library()).run(None, feeds | wrong)


@pytest.mark.parametrize("value", EXTREME)
def test_invalid_numbers_of_heads(value: int) -> None:
    """Three times the largest number of heads overflows 64 bits."""
    library = cpu_kernels.library()
    expected = "is not an integer from 1 to 2147483647"
    for model in (packed_model(value, None), packed_model(value, 3), packed_model(2, value), multi_head_model(value)):
        with pytest.raises(Exception, match=expected):
            session(model, library)
    for name in ("num_heads", "kv_num_heads"):
        with pytest.raises(Exception, match=f"GroupQueryAttention: {name} {expected}"):
            session(causal_model(SIZES, **{name: value}), library)


@pytest.mark.parametrize("name", ["K", "N"])
@pytest.mark.parametrize("value", EXTREME)
def test_invalid_matmul_sizes(name: str, value: int) -> None:
    with pytest.raises(Exception, match=f"MatMulNBits: {name} is not an integer from 1 to 2147483647"):
        matmul_nbits({name: value})


def test_matmul_sizes_whose_product_overflows_to_zero() -> None:
    """N * K wraps to 0, the size of an empty weight."""
    nothing: dict[str, Array] = {"values": np.zeros((0, 2, 16), np.uint8), "scales": np.zeros((0, 2), np.float32)}
    with pytest.raises(Exception, match="K is not an integer"):
        matmul_nbits({"N": 2**31 - 1, "K": 2**33}, **nothing)
    with pytest.raises(Exception, match="the weight's values are not N"):
        matmul_nbits({"N": 2**31 - 1}, **nothing).run(None, {"x": np.zeros((1, 1, 64), np.float32)})


def test_empty_zero_points_are_not_missing_ones() -> None:
    model = matmul_nbits({}, zero_points=np.zeros(0, np.uint8))
    with pytest.raises(Exception, match="expected a zero point for each block"):
        model.run(None, {"x": np.zeros((1, 1, 64), np.float32)})


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"unidirectional": 1.0}, "unidirectional is not an integer"),
        ({"unidirectional": "1"}, "unidirectional is not an integer"),
        ({"scale": 1}, "scale is not a finite number"),
        ({"scale": float("nan")}, "scale is not a finite number"),
        ({"mask_filter_value": float("inf")}, "mask_filter_value is not a finite number"),
        ({"num_heads": 2.0}, "num_heads is not an integer"),
    ],
)
def test_attributes_of_wrong_type_or_not_finite(attributes: dict[str, Any], said: str) -> None:
    """An invalid attribute is not a missing one, which has a default."""
    with pytest.raises(Exception, match=f"MultiHeadAttention: {said}"):
        session(multi_head_model(2, **attributes), cpu_kernels.library())


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_zero_points_of_wrong_type(dtype: type) -> None:
    with pytest.raises(Exception, match="MatMulNBits"):
        matmul_nbits({}, zero_points=np.zeros(4, dtype))


def test_alpha_that_is_not_finite() -> None:
    with pytest.raises(Exception, match="QuickGelu: alpha is not a finite number"):
        session_of(helper.make_node("QuickGelu", ["x"], ["y"], domain="com.microsoft", alpha=float("nan")))


@pytest.mark.parametrize("scale", [0, -1, np.nan, np.inf, 1e-42, 3e38])
def test_invalid_activation_scales(scale: float) -> None:
    model = integer_matmul(integer_tensors(np.random.default_rng(0), 64, 8, scale, 100))
    with pytest.raises(Exception, match="IntegerProduct: expected a scale of x above 0"):
        model.run(None, {"x": np.zeros((1, 1, 64), np.float32)})


@pytest.mark.parametrize("rows", [1, 9])
def test_largest_number_of_inputs_of_an_int32_sum(rows: int) -> None:
    most = 65_793
    one = np.random.default_rng(0)
    tensors = integer_tensors(one, most, 2, 1.0, 0) | {"values": np.full((2, most), -128, np.int8)}
    (y,) = integer_matmul(tensors).run(None, {"x": np.full((1, rows, most), 255, np.float32)})
    expected = -128.0 * 255 * most * tensors["scales"].astype(np.float64)
    np.testing.assert_allclose(y[0], np.tile(expected + tensors["bias"], (rows, 1)), rtol=1e-6)
    with pytest.raises(Exception, match="IntegerProduct: 65794 inputs; expected up to 65793"):
        integer_matmul(integer_tensors(one, most + 1, 2, 1.0, 0)).run(
            None, {"x": np.zeros((1, 1, most + 1), np.float32)}
        )


def test_no_outputs() -> None:
    model = integer_matmul(integer_tensors(np.random.default_rng(0), 64, 0, 0.1, 0))
    for rows in (1, 9):
        assert model.run(None, {"x": np.zeros((1, rows, 64), np.float32)})[0].shape == (1, rows, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 9])
def test_rows_that_are_not_finite_give_nan(rows: int, value: float) -> None:
    """Other rows do not change."""
    x = np.random.default_rng(0).normal(size=(1, rows, 64)).astype(np.float32)
    (expected,) = matmul_nbits({}).run(None, {"x": x})
    x[0, 0, 7] = value
    (y,) = matmul_nbits({}).run(None, {"x": x})
    assert np.isnan(y[0, 0]).all()
    np.testing.assert_array_equal(y[0, 1:], expected[0, 1:])


def test_static_quantization_of_values_that_are_not_finite() -> None:
    """Results equal those of ONNX Runtime's QuantizeLinear."""
    tensors = integer_tensors(np.random.default_rng(0), 64, 40, 0.02, 100)
    x = np.random.default_rng(1).normal(size=(1, 9, 64)).astype(np.float32)
    x[0, 1, 3:6], x[0, 2, 9], x[0, 3, 10] = np.nan, np.inf, -np.inf
    own, theirs = (integer_matmul(tensors, kernels).run(None, {"x": x})[0] for kernels in (True, False))
    np.testing.assert_allclose(own, theirs, atol=1e-3 * np.abs(theirs).max())


def test_prefill_that_is_not_finite_gives_nan_scales() -> None:
    """With finite scales, later answers use wrong keys."""
    feeds = cached_feeds(INT8, 0, 8, 4)
    feeds["qkv"][0, 3, 40] = np.nan  # a key
    key_scale = session(cached_model(INT8), cpu_kernels.library()).run(None, feeds)[3]
    assert np.isnan(key_scale).any()


@pytest.mark.parametrize("off", [0, 1, 2, 3])
def test_external_data_at_any_offset(tmp_path: Path, off: int) -> None:
    function = integer_matmul_function(21)
    node = helper.make_node(function.name, list(function.input), ["y"], domain=function.domain)
    tensors, data = integer_tensors(np.random.default_rng(0), 64, 40, 0.02, 100), b""
    stored = []
    for name, array in tensors.items():
        array = np.asarray(array)
        data += bytes(-len(data) % 64 + off)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "data"), ("offset", len(data)), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        data += array.tobytes()
        stored.append(tensor)
    (tmp_path / "data").write_bytes(data)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], stored)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(function.domain, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(cpu_kernels.library()))
    one = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(1, 9, 64)).astype(np.float32)
    np.testing.assert_array_equal(one.run(None, {"x": x})[0], integer_matmul(tensors).run(None, {"x": x})[0])


def test_valid_and_invalid_calls_from_many_threads() -> None:
    """More threads than processors call one session."""
    model = session(causal_model(SIZES), cpu_kernels.library(), threads=4)
    feeds = causal_feeds(SIZES, 4, 8, 3)
    expected = model.run(None, feeds)[0]

    def call(index: int) -> bool:
        if index % 2:
            return bool(np.array_equal(model.run(None, feeds)[0], expected))
        with pytest.raises(Exception, match="GroupQueryAttention: expected query"):
            model.run(None, feeds | {"qkv": feeds["qkv"][:, :, 1:]})
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(call, range(400)))
