"""Graphs of single operators on ONNX Runtime, against the float64 that engines are compared with."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from support.operator_cases import error, outputs
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks.acceptance import operators
from fusion_edge.benchmarks.acceptance.comparison import ROUNDING, SUMS, largest_error
from fusion_edge.export.engines.decompositions import SINCE, decompose_operators
from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.runtime.errors import FusionError


def shifted(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    return np.roll(array, rows, axis=-2)


@needs_opset_24
@pytest.mark.parametrize(("rows", "length"), [(16, 16), (1, 40)])
@pytest.mark.parametrize("dim", [64, 72, 96, 128])
def test_attention(dim: int, rows: int, length: int) -> None:
    case = operators.attention(dim, rows, length, heads=2)
    computed = outputs(case)
    assert error(case, computed) <= case.tolerance
    with pytest.raises(FusionError, match="elements are wrong"):
        error(case, np.roll(computed, 1, axis=1))  # of another head


@needs_opset_24
@pytest.mark.parametrize(("rows", "before"), [(16, 24), (1, 40)])
@pytest.mark.parametrize("dim", [96, 128])
def test_quantized_kv_cache(rows: int, before: int, dim: int) -> None:
    case = operators.quantized_kv_cache(rows, before, heads=2, dim=dim)
    computed = outputs(case)
    assert error(case, computed) <= case.tolerance
    assert case.tolerance < 0.2 * computed.astype(np.float64).std()
    with pytest.raises(FusionError, match="elements are wrong"):
        error(case, np.roll(computed, 1, axis=1))  # of another head
    forgotten = dict(case.inputs)
    for name in ("slots", "prefix"):
        forgotten |= {key: np.zeros_like(array) for key, array in case.inputs.items() if key.startswith(f"{name}.")}
    with pytest.raises(FusionError, match="elements are wrong"):
        error(case, outputs(dataclasses.replace(case, inputs=forgotten)))


@needs_opset_24
def test_quantized_kv_cache_with_flat_scores() -> None:
    """Its tolerance finds products in float16, where they are subnormal. ONNX Runtime's are float32 on a CPU."""
    case = operators.quantized_kv_cache(1, 4095, heads=4, is_flat=True)
    computed = outputs(case)
    assert error(case, computed) <= case.tolerance / 2
    codes, scales = (case.inputs[f"slots.0.value{suffix}"] for suffix in ("", "_scale"))
    parts = (codes / 128).astype(np.float16) * (np.float16(1 / 4096) * scales)[..., None]
    assert parts.dtype == np.float16
    with pytest.raises(FusionError, match="elements are wrong"):
        error(case, parts.sum(0, dtype=np.float64)[None, :, None])


def test_attention_decomposed_for_older_versions() -> None:
    case = operators.attention(72, 16, 32, heads=2)
    decompose_operators(case.model, list(SINCE), 1)
    assert error(case, outputs(case)) <= case.tolerance


@needs_opset_24
def test_tensor_scatter() -> None:
    case = operators.tensor_scatter(2, 5, heads=2, dim=8)
    assert error(case, outputs(case)) == 0
    with pytest.raises(FusionError, match="elements are wrong"):
        error(case, case.inputs["past"])  # not written
    with pytest.raises(FusionError, match="elements are wrong"):
        error(case, shifted(outputs(case), 1))


def test_scatter_decomposed_for_older_versions() -> None:
    case = operators.tensor_scatter(2, 5, heads=2, dim=8)
    decompose_operators(case.model, list(SINCE), 1)
    assert error(case, outputs(case)) == 0


def test_gemm() -> None:
    case = operators.gemm(64)
    assert error(case, outputs(case)) == 0


@pytest.mark.parametrize("rows", [(0, 144), (1, 1), (2, 144)])
@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.operator)
def test_plugins_have_symbolic_sizes(plugin: Any, rows: tuple[int, int]) -> None:
    """One engine takes every number of rows; the parser finds the plugin by the node's attributes."""
    case = operators.plugin(plugin, *rows, 32)
    (node,) = case.model.graph.node
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    assert attributes == {"plugin_namespace": node.domain.encode(), "aot": 1}
    assert list(case.inputs) == list(plugin.inputs)
    for value in case.model.graph.input:
        sizes = [one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim]
        for size, actual in zip(sizes, case.inputs[value.name].shape, strict=True):
            least, _, most = case.ranges[size] if isinstance(size, str) else (size, size, size)
            assert least <= actual <= most
    assert case.uses_plugins


def test_largest_error() -> None:
    expected = np.array([1.0, -8.0])
    assert largest_error("y", np.array([1, -8], np.float16), expected) == 0
    allowed = ROUNDING * 8 + SUMS * 8
    assert largest_error("y", np.array([1, -8 + allowed]), expected) == allowed
    with pytest.raises(FusionError, match=r"^y: 1 of 2 elements are wrong; at \[1\] -7\.99\d*, expected -8 with"):
        largest_error("y", np.array([1, -8 + 1.01 * allowed]), expected)
    assert largest_error("y", np.array([1, -8 + 1.01 * allowed]), expected, allowed) > allowed
    with pytest.raises(FusionError, match=r"^y: 1 of 2 .* at \[0\] nan"):
        largest_error("y", np.array([np.nan, -8]), expected)
    with pytest.raises(FusionError, match=r"the shape \[1\], expected \[2\]"):
        largest_error("y", np.zeros(1), expected)
    assert largest_error("y", np.zeros((0, 3)), np.zeros((0, 3))) == 0
