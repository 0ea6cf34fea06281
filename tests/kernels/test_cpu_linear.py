"""MatMulNBits of the CPU kernels against a reference."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper
from support.cpu_kernel_switches import needs_cpu_kernels, streams
from support.linear_references import FEW_ROWS, linear
from support.one_node import gelu, session_of

from fusion_edge.kernels.onnx_functions.linear import matmul_nbits_function
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import Packed, quantize
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

Array = npt.NDArray[Any]


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs x86-64 and GCC")
def test_the_library_was_built() -> None:
    """The library is optional, so nothing else fails if it does not compile."""
    assert cpu_kernels.library() is not None


@needs_cpu_kernels
def test_tiers_are_those_that_tests_run_on() -> None:
    tiers = cpu_kernels.tiers()
    assert tiers == tuple(name for name in cpu_kernels.TIERS if name in tiers)
    assert cpu_kernels.tier() == tiers[-1]
    assert not cpu_kernels.use_tier("another")


def session(
    packed: Packed,
    weight_format: WeightFormat,
    inputs: int,
    bias: Array | None = None,
    use_kernels: bool = True,
    changed: Mapping[str, int] = MappingProxyType({}),
    half_scales: bool = False,
    gelu_first: bool = False,
) -> ort.InferenceSession:
    """Return a session of one node: Microsoft's operator, or with ``half_scales`` the function with float16 scales."""
    scales = packed.scales.astype(np.float16 if half_scales else np.float32)
    tensors: dict[str, Array] = {"values": packed.values, "scales": scales}
    names = ["x", "values", "scales", "", "", ""]
    for place, name, array in ((3, "zero_points", packed.zero_points), (5, "bias", bias)):
        if array is not None:
            tensors[name], names[place] = array, name
    while not names[-1]:
        names.pop()
    rows = len(packed.values)
    sizes: dict[str, Any] = {
        "K": inputs,
        "N": rows,
        "bits": weight_format.bits,
        "block_size": weight_format.block_size,
        **changed,
    }
    function = matmul_nbits_function(21, gelu_first) if half_scales else None
    operator, domain = (function.name, function.domain) if function else ("MatMulNBits", "com.microsoft")
    node = helper.make_node(operator, names, ["y"], domain=domain, accuracy_level=4, **sizes)
    return session_of(node, function, tensors, use_kernels)


@needs_cpu_kernels
@given(
    kind=st.sampled_from(["int4", "uint4", "int8", "uint8"]),
    group_size=st.sampled_from([16, 32, 64, 128, 256]),
    has_bias=st.booleans(),
    half_scales=st.booleans(),
    rows=st.sampled_from([1, 2, 3, 7, 8, 9, 14, 29, 40]),
    inputs=st.integers(1, 700),
    outputs=st.integers(1, 90),
    seed=st.integers(0, 2**32 - 1),
)
@example("int4", 128, False, True, 1, 3072, 70, 0)
@example("uint4", 32, True, False, 1, 608, 65, 1)
@example("uint8", 256, True, True, 12, 1024, 64, 2)
@example("uint4", 32, True, True, 13, 96, 1600, 3)  # several panels per thread
@example("int8", 64, True, True, 12, 130, 1600, 3)
@example("int8", 128, False, False, 1, 200, 1100, 4)
@example("int4", 128, False, True, 70, 3300, 300, 5)  # several blocks of inputs
@example("uint4", 16, True, True, 500, 1100, 40, 6)  # several blocks of rows
@example("uint8", 32, True, True, 500, 1100, 270, 7)
@settings(max_examples=60, deadline=None)
def test_matmul_nbits(
    each_tier: str,
    kind: str,
    group_size: int,
    has_bias: bool,
    half_scales: bool,
    rows: int,
    inputs: int,
    outputs: int,
    seed: int,
) -> None:
    weight_format = WeightFormat(kind, group_size)
    generator = np.random.default_rng(seed)
    spread = np.exp(generator.uniform(-3, 3, (outputs, 1)))
    packed = quantize((generator.normal(0.1, size=(outputs, inputs)) * spread).astype(np.float32), weight_format)
    bias = generator.normal(size=outputs).astype(np.float32) if has_bias else None
    x = generator.normal(size=(rows, inputs)).astype(np.float32) * np.exp(generator.uniform(-3, 3, inputs)).astype("f4")
    activations, weight = linear(x, packed, weight_format, each_tier)
    expected = activations @ weight.T + (0 if bias is None else bias)
    one = session(packed, weight_format, inputs, bias, half_scales=half_scales)
    size = np.abs(activations) @ np.abs(weight).T + (0 if bias is None else np.abs(bias))
    with streams(False):
        (actual,) = one.run(None, {"x": x[None]})
    assert np.abs(actual[0] - expected).max() <= 2e-6 * size.max()
    if rows <= FEW_ROWS:
        with streams(True):
            (by_turns,) = one.run(None, {"x": x[None]})
        assert np.array_equal(actual, by_turns)


@needs_cpu_kernels
@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("kind", [("int8", 128), ("int4", 32), ("uint4", 256), ("uint8", 16)])
def test_gelu_matmul_nbits(each_tier: str, rows: int, kind: tuple[str, int]) -> None:
    weight_format = WeightFormat(*kind)
    generator = np.random.default_rng(rows)
    packed = quantize(generator.normal(size=(70, 300)).astype(np.float32), weight_format)
    bias, x = generator.normal(size=70).astype(np.float32), generator.normal(size=(rows, 300)).astype(np.float32)
    inputs, weight = linear(gelu(x.astype(np.float64)).astype(np.float32), packed, weight_format, each_tier)
    expected = inputs @ weight.T + bias
    for use_kernels in (True, False):
        one = session(packed, weight_format, 300, bias, use_kernels, half_scales=True, gelu_first=True)
        # An error in the last bit of GELU may round to another integer. ONNX Runtime quantizes differently.
        tolerance = 5e-3 if use_kernels else 2e-2
        assert np.abs(one.run(None, {"x": x[None]})[0][0] - expected).max() < tolerance * np.abs(expected).max()


@needs_cpu_kernels
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.usefixtures("each_tier")
def test_zero_rows_and_no_rows(kind: str) -> None:
    weight_format = WeightFormat(kind, 32)
    packed = quantize(np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32), weight_format)
    one = session(packed, weight_format, 64)
    for nothing in (0, 1e-38):
        for rows in (1, 3):
            assert not one.run(None, {"x": np.full((1, rows, 64), nothing, np.float32)})[0].any()
    assert one.run(None, {"x": np.zeros((2, 0, 64), np.float32)})[0].shape == (2, 0, 40)


@needs_cpu_kernels
@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "uint8"])
def test_a_row_does_not_depend_on_other_rows(kind: str) -> None:
    """A prompt behind a prefix has fewer rows than the whole prompt, more than four, and the same values."""
    weight_format = WeightFormat(kind, 64)
    generator = np.random.default_rng(0)
    packed = quantize(generator.normal(size=(100, 800)).astype(np.float32), weight_format)
    one = session(packed, weight_format, 800)
    x = generator.normal(size=(500, 800)).astype(np.float32)
    x[40] = 1e30
    (all_rows,) = one.run(None, {"x": x[None]})
    for start, count in ((0, 5), (1, 31), (470, 17), (300, 100), (37, 64)):
        (rows,) = one.run(None, {"x": x[None, start : start + count]})
        assert np.array_equal(rows[0], all_rows[0, start : start + count])


@needs_cpu_kernels
@pytest.mark.usefixtures("each_tier")
@pytest.mark.parametrize("kind", ["int4", "uint8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_infinite_input_makes_its_row_nan(kind: str, value: float) -> None:
    weight_format = WeightFormat(kind, 32)
    generator = np.random.default_rng(0)
    one = session(quantize(generator.normal(size=(40, 300)).astype(np.float32), weight_format), weight_format, 300)
    x = generator.normal(size=(1, 35, 300)).astype(np.float32)
    (expected,) = one.run(None, {"x": x})
    x[0, 20, 299] = value
    (actual,) = one.run(None, {"x": x})
    assert np.isnan(actual[0, 20]).all()
    assert np.array_equal(np.delete(actual, 20, 1), np.delete(expected, 20, 1))


@needs_cpu_kernels
@pytest.mark.usefixtures("each_tier")
def test_close_to_onnxruntime() -> None:
    """Both quantize to int8; AMX with larger blocks."""
    weight_format = WeightFormat("int4", 128)
    generator = np.random.default_rng(0)
    packed = quantize(generator.normal(size=(200, 384)).astype(np.float32), weight_format)
    x = {"x": generator.normal(size=(1, 30, 384)).astype(np.float32)}
    bias = generator.normal(size=200).astype(np.float32)
    for half_scales in (False, True):
        own, theirs = (
            session(packed, weight_format, 384, bias, kernels, half_scales=half_scales).run(None, x)[0]
            for kernels in (True, False)
        )
        assert np.abs(own - theirs).max() < 1e-2 * np.abs(theirs).max()
        assert not np.array_equal(own, theirs)  # so the kernels were used


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"bits": 2}, "weights of 4 or 8 bits"),
        ({"block_size": 0}, "block_size of 16, 32"),
        ({"block_size": 48}, "block_size of 16, 32"),
        ({"block_size": 512}, "block_size of 16, 32"),
        ({"N": -1}, "N is not an integer from 1 to"),
    ],
)
def test_invalid_attributes(changed: dict[str, int], named: str) -> None:
    weight_format = WeightFormat("int4", 32)
    with pytest.raises(Exception, match=named):
        session(quantize(np.ones((4, 64), np.float32), weight_format), weight_format, 64, changed=changed)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("values", "the weight's values are not N"),
        ("scales", "a scale for each block"),
        ("zero_points", "a zero point for each block"),
        ("bias", "N values of the bias"),
    ],
)
@pytest.mark.parametrize("operator", ["MatMulNBits", "fusion_edge.MatMulNBits", "GeluMatMulNBits"])
def test_tensors_that_are_too_small(name: str, named: str, operator: str) -> None:
    """Reads end beyond the tensors. The message names the operator, so its kernel ran, not an inlined function."""
    weight_format = WeightFormat("uint4", 32)
    whole = quantize(np.ones((4, 64), np.float32), weight_format)
    parts = {part: getattr(whole, part) for part in ("values", "scales", "zero_points")}
    bias = np.zeros(4, np.float32)
    if name == "bias":
        bias = bias[:3]
    else:
        parts[name] = parts[name][:3]
    half_scales, gelu_first = operator != "MatMulNBits", operator.startswith("Gelu")
    one = session(
        Packed(**parts), weight_format, 64, bias, changed={"N": 4}, half_scales=half_scales, gelu_first=gelu_first
    )
    with pytest.raises(Exception, match=f"{operator.rpartition('.')[2]}: .*{named}"):
        one.run(None, {"x": np.zeros((1, 1, 64), np.float32)})


@needs_cpu_kernels
@pytest.mark.usefixtures("each_tier")
def test_two_sessions_in_two_threads() -> None:
    """Scratch memory of a thread is not shared between sessions."""
    generator = np.random.default_rng(0)
    weight_format = WeightFormat("int4", 32)
    works = []
    for inputs, outputs, rows in ((640, 200, 40), (96, 1200, 3)):
        weight = generator.normal(size=(outputs, inputs)).astype(np.float32)
        one = session(quantize(weight, weight_format), weight_format, inputs)
        x = {"x": generator.normal(size=(1, rows, inputs)).astype(np.float32)}
        works.append((one, x, one.run(None, x)[0]))

    def repeat(one: ort.InferenceSession, x: dict[str, Array], expected: Array) -> bool:
        return all(np.array_equal(one.run(None, x)[0], expected) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert all(same.result() for same in [pool.submit(repeat, *work) for work in works])


@needs_cpu_kernels
def test_input_width_that_is_not_k() -> None:
    weight_format = WeightFormat("int4", 32)
    one = session(quantize(np.ones((4, 64), np.float32), weight_format), weight_format, 64)
    with pytest.raises(Exception, match="K is not the input's width"):
        one.run(None, {"x": np.zeros((1, 1, 32), np.float32)})
