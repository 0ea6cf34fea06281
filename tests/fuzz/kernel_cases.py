"""Random calls of the linear and activation operators, and checks of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from support.linear_references import integer_linear, integer_tensors, linear, scale_block
from support.one_node import gelu

from fusion_edge.kernels.operators import (
    CONTRIBUTED_MATMUL_NBITS,
    FAST_GELU,
    GELU_INTEGER_MATMUL,
    GELU_MATMUL_NBITS,
    INTEGER_LINEAR_INPUTS,
    INTEGER_MATMUL,
    INTEGER_MLP,
    MATMUL_NBITS,
    QUICK_GELU,
    SWIGLU,
    Operator,
)
from fusion_edge.quant.formats import STORED_GROUP_SIZES, WeightFormat
from fusion_edge.quant.packing import Packed
from fuzz.fake_onnxruntime import Attribute

Array = npt.NDArray[Any]
Random = np.random.Generator
Check = Callable[[list[Array], str], str | None]
SUM_ERROR = 4e-6  # relative to the sum of magnitudes: float32 has 24 bits, and a lane sums some tens of terms
ZERO_ERROR = 1e-25  # inputs below 1e-30 count as 0
ROWS = (1, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 30)
NOT_FINITE = (np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    operator: Operator
    attributes: Mapping[str, Attribute]
    inputs: Mapping[str, Array | None]
    """By name. None: missing, as is a name that is not there."""
    check: Check | None
    """Returns a message if the outputs of a tier are wrong. None: the call is invalid."""
    counts: tuple[str, ...] = ()
    """Attributes that are sizes."""
    dependent: tuple[str, ...] = ()
    """Inputs whose shape follows from the others and the attributes."""
    unsupported: tuple[str, ...] = ()
    """Inputs that the kernel does not support."""
    in_place: Mapping[str, str] = field(default_factory=dict)
    """Input whose memory an output shares, by output."""
    bfloat16: bool = False


def differs(actual: Array, expected: Array, tolerance: Array | float, or_nan: bool = False) -> str | None:
    """Return a message unless ``actual`` is as expected.

    Where ``expected`` is not finite, any value that is not finite will do. With ``or_nan`` other values may be NaN.
    """
    if actual.shape != expected.shape:
        return f"shape {actual.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    if np.isfinite(actual[~finite]).any():
        return "finite where it must not be"
    error = np.abs(np.where(finite, actual.astype(np.float64) - np.where(finite, expected, 0), 0))
    allowed = (error <= tolerance) | np.isinf(tolerance) | (np.isnan(actual) if or_nan else False)
    if not allowed.all():
        index = tuple(int(i) for i in np.argwhere(~allowed)[0])
        return f"at {index}: {actual[index]}, expected {expected[index]}"
    return None


def activations(random: Random, *shape: int) -> Array:
    """Return random activations, a quarter of the draws with extreme values."""
    x = (random.normal(size=shape) * np.exp(random.uniform(-2, 2, shape[-1]))).astype(np.float32)
    return with_extremes(x, random) if random.random() < 1 / 4 else x


def with_extremes(x: Array, random: Random) -> Array:
    """Return ``x`` with up to three values that are not finite, huge or tiny."""
    value = (*NOT_FINITE, 3e38, -3e38, 1e-40)[random.integers(6)]
    indices = random.integers(0, x.size, random.integers(1, 4))
    x = x.copy()
    x.reshape(-1)[indices] = value
    return x


def split_rows(x: Array, random: Random) -> Array:
    """Return the rows ``[rows, width]`` with two to four dimensions."""
    shapes = ((len(x),), (1, len(x)), (len(x), 1), (1, 1, len(x)))
    return x.reshape(*shapes[random.integers(4)], x.shape[1])


def near_ties(quotients: Array, margin: Array | float) -> Array:
    """Return where an error of ``margin`` may round a quotient to the next integer."""
    with np.errstate(invalid="ignore"):
        return np.abs(quotients - np.floor(quotients) - 0.5) <= margin


def matmul_nbits(random: Random) -> Case:
    kinds = ("int4", "uint4", "int8", "uint8")
    weight_format = WeightFormat(kinds[random.integers(4)], int(random.choice(STORED_GROUP_SIZES)))
    is_wide = random.random() < 0.05
    outputs, inputs = (int(random.integers(1, most)) for most in ((1700, 140) if is_wide else (120, 700)))
    has_half_scales, has_bias, rows = random.random() < 0.7, random.random() < 0.5, int(random.choice(ROWS))
    gelu_first = has_half_scales and random.random() < 0.4
    shape = weight_format.packed_shape(outputs, inputs)
    scales = random.uniform(0.001, 0.1, shape[:2]).astype(np.float16 if has_half_scales else np.float32)
    zero_bytes = (outputs, -(-shape[1] * weight_format.bits // 8))
    packed = Packed(
        random.integers(0, 256, shape, np.uint8),
        scales,
        None if weight_format.is_symmetric else random.integers(0, 256, zero_bytes, np.uint8),
    )
    bias = random.normal(size=outputs).astype(np.float32) if has_bias else None
    x = activations(random, rows, inputs)
    with np.errstate(all="ignore"):
        activated = gelu(x.astype(np.float64)).astype(np.float32) if gelu_first else x
    x_input = split_rows(x, random)

    def check(results: list[Array], tier: str) -> str | None:
        usable = np.isfinite(activated).all(1)
        used = np.where(usable[:, None], activated, 0)
        quantized_x, weight = linear(used, packed, weight_format, tier)
        expected = quantized_x @ weight.T + (0 if bias is None else bias)
        expected[~usable] = np.nan
        magnitudes = np.abs(quantized_x) @ np.abs(weight).T + (0 if bias is None else np.abs(bias))
        tolerance = SUM_ERROR * magnitudes.max(1) + ZERO_ERROR
        margins = tolerance[:, None] + (
            gelu_ties(used, scale_block(weight_format, rows, tier), weight) if gelu_first else 0
        )
        margins[np.abs(expected).max(1) > 1e37] = np.inf  # sums may overflow
        return differs(results[0].reshape(rows, -1), expected, margins)

    sizes = {"K": inputs, "N": outputs, "bits": weight_format.bits, "block_size": weight_format.block_size}
    operator = GELU_MATMUL_NBITS if gelu_first else MATMUL_NBITS if has_half_scales else CONTRIBUTED_MATMUL_NBITS
    tensors: dict[str, Array | None]
    tensors = {"values": packed.values, "scales": scales, "zero_points": packed.zero_points, "bias": bias}
    return Case(
        operator,
        sizes | {"accuracy_level": 4},
        {"x": x_input, **tensors},
        check,
        counts=tuple(sizes),
        dependent=tuple(name for name, array in tensors.items() if array is not None),
        unsupported=("group_indices",),
    )


def gelu_ties(activated: Array, block: int, weight: Array) -> Array:
    """Return the error of results where the last bits of GELU may round an activation to the next integer."""
    width = activated.shape[1]
    padded = np.pad(activated, ((0, 0), (0, -width % block)))
    steps = np.abs(padded.reshape(len(padded), -1, block)).max(-1, keepdims=True) / 127
    steps = np.repeat(steps.reshape(len(padded), -1), block, 1)[:, :width].astype(np.float64)
    quotients = np.divide(activated, steps, out=np.zeros_like(steps), where=steps > 0)
    return np.asarray((near_ties(quotients, 1e-3) * steps) @ np.abs(weight).T)


def integer_matmul(random: Random) -> Case:
    gelu_first = random.random() < 0.5
    rows, inputs, outputs = int(random.choice(ROWS)), int(random.integers(1, 700)), int(random.integers(1, 120))
    tensors = integer_tensors(random, inputs, outputs, random.choice([0.003, 0.02, 0.1]), int(random.integers(256)))
    x = activations(random, rows, inputs)
    with np.errstate(all="ignore"):
        activated = gelu(x.astype(np.float64)) if gelu_first else x

    def check(results: list[Array], _: str) -> str | None:
        expected, tolerance = integer_reference(tensors, activated, 1e-3 if gelu_first else 0)
        return differs(results[0].reshape(rows, -1), expected, tolerance)

    arrays = {name: np.asarray(tensors[name]) for name in INTEGER_LINEAR_INPUTS}
    operator = GELU_INTEGER_MATMUL if gelu_first else INTEGER_MATMUL
    return Case(operator, {}, {"x": split_rows(x, random), **arrays}, check, dependent=tuple(arrays))


def integer_reference(tensors: Mapping[str, Array], x: Array, margin: Array | float) -> tuple[Array, Array]:
    """Return the output of an 8-bit linear layer, and its error if the quotients of x are off by ``margin``.

    NaN quantizes as -inf does.
    """
    x = np.where(np.isnan(x), -np.inf, x)
    expected, most = integer_linear(tensors, x)
    weight = np.abs(tensors["values"].astype(np.float64) * tensors["scales"].astype(np.float64)[:, None])
    scale = np.float64(tensors["x_scale"])
    ties = near_ties(np.clip(x / scale, -1e6, 1e6), margin) if np.any(margin) else np.zeros(x.shape)
    return expected, ties * scale @ weight.T + SUM_ERROR * most


def integer_mlp(random: Random) -> Case:
    rows, inputs, hidden = int(random.choice(ROWS)), int(random.integers(1, 300)), int(random.integers(1, 300))
    outputs = int(random.integers(1, 100))
    first = integer_tensors(random, inputs, hidden, 0.02, int(random.integers(256)))
    second = integer_tensors(random, hidden, outputs, 0.02, int(random.integers(256)))
    x = activations(random, rows, inputs)

    def check(results: list[Array], _: str) -> str | None:
        between, tolerance = integer_reference(first, x, 0)
        margin = (np.broadcast_to(1.2 * tolerance, between.shape) + 1e-5) / np.float64(second["x_scale"]) + 1e-3
        return differs(results[0].reshape(rows, -1), *integer_reference(second, gelu(between), margin))

    arrays = {
        f"{layer}_{name}": np.asarray(tensors[name])
        for layer, tensors in (("up", first), ("down", second))
        for name in INTEGER_LINEAR_INPUTS
    }
    return Case(INTEGER_MLP, {}, {"x": split_rows(x, random), **arrays}, check, dependent=tuple(arrays))


def activation(random: Random) -> Case:
    operator = (QUICK_GELU, FAST_GELU, SWIGLU)[random.integers(3)]
    sizes = (1, 5, 15, 16, 17, 100, 16_384, 16_385, 40_000)
    x = activations(random, 1, int(random.choice(sizes)))
    up = activations(random, *x.shape) if operator is SWIGLU else None
    alpha = float(np.float32(random.uniform(-1, 2))) if operator is QUICK_GELU else 1.0

    def check(outputs: list[Array], _: str) -> str | None:
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64)
            expected = gelu(wide) if operator is FAST_GELU else wide / (1 + np.exp(-alpha * wide))
            size = np.abs(expected) + np.abs(wide) / 4
            if up is not None:
                expected, size = expected * up, size * np.abs(up)
        tolerance = np.where((np.abs(expected) < 1e37) & np.isfinite(size), SUM_ERROR * size + 1e-6, np.inf)
        # -inf times an exponential that is 0 may be NaN.
        return differs(outputs[0], expected, tolerance, or_nan=not np.isfinite(x).all())

    if operator is SWIGLU:
        return Case(operator, {}, {"gate": x, "up": up}, check, dependent=("up",))
    attributes = {"alpha": alpha} if operator is QUICK_GELU else {}
    return Case(operator, attributes, {"x": x}, check, unsupported=("bias",) if operator is FAST_GELU else ())
