"""Activation operators of the CPU kernels against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from onnx import helper
from support.cpu_kernel_switches import needs_cpu_kernels
from support.one_node import gelu, session_of

from fusion_edge.kernels.onnx_functions.activations import swiglu_function

Array = npt.NDArray[Any]

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("each_tier")]


def session(operator: str, inputs: int = 1, use_kernels: bool = True, **attributes: Any) -> ort.InferenceSession:
    function = swiglu_function(21) if operator == "SwiGlu" else None
    domain = function.domain if function else "com.microsoft"
    node = helper.make_node(operator, ["x", "bias"][:inputs], ["y"], domain=domain, **attributes)
    return session_of(node, function, use_kernels=use_kernels)


def expected(x: Array, operator: str, alpha: float) -> Array:
    x = x.astype(np.float64)
    if operator == "FastGelu":
        return gelu(x)
    return np.asarray(x / (1 + np.exp(-alpha * x)))


@pytest.mark.parametrize(("operator", "alpha"), [("FastGelu", 0.0), ("QuickGelu", 1.0), ("QuickGelu", 1.702)])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 17, 31), (40_000,), (0, 4)])
def test_close_to_float64(operator: str, alpha: float, shape: tuple[int, ...]) -> None:
    attributes: dict[str, Any] = {"alpha": alpha} if operator == "QuickGelu" else {}
    one = session(operator, **attributes)
    x = np.random.default_rng(0).normal(0, 4, shape).astype(np.float32)
    np.testing.assert_allclose(one.run(None, {"x": x})[0], expected(x, operator, alpha), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("operator", ["FastGelu", "QuickGelu"])
def test_extreme_values_do_not_overflow(operator: str) -> None:
    x = np.array([-1e30, -100, -0.0, 0, 100, 1e10], np.float32)
    (y,) = session(operator).run(None, {"x": x})
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 100, np.float32(1e10)])


@pytest.mark.parametrize("shape", [(1,), (2, 17, 31), (40_000,), (0, 4)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    """The kernel, and ONNX Runtime's inlined function, whose exponential is less accurate."""
    gate, up = np.random.default_rng(0).normal(0, 4, (2, *shape)).astype(np.float32)
    for use_kernels, atol in ((True, 4e-6), (False, 4e-5)):
        (y,) = session("SwiGlu", 2, use_kernels).run(None, {"x": gate, "bias": up})
        np.testing.assert_allclose(y, expected(gate, "QuickGelu", 1.0) * up, rtol=2e-6, atol=atol)


def test_swiglu_rejects_another_shape() -> None:
    with pytest.raises(Exception, match="of the same shape"):
        session("SwiGlu", 2).run(None, {"x": np.ones(4, np.float32), "bias": np.ones(3, np.float32)})


def test_fast_gelu_rejects_a_bias() -> None:
    with pytest.raises(Exception, match="a bias is not supported"):
        session("FastGelu", inputs=2).run(None, {"x": np.ones(4, np.float32), "bias": np.ones(4, np.float32)})
