"""Calls of our CPU kernels but those of attention, drawn at random, and what each must answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from support.linear_references import integer_product, integer_tensors, rounded
from support.one_node import gelu

from fusion_edge.kernels.operators import DOMAIN, INTEGER_LINEAR_INPUTS, MICROSOFT
from fusion_edge.quant.formats import STORED_GROUP_SIZES, WeightFormat
from fusion_edge.quant.packing import Packed, dequantize
from fuzz.fake_onnxruntime import Attribute

Array = npt.NDArray[Any]
Random = np.random.Generator
Check = Callable[[list[Array]], str | None]
SUMS = 4e-6  # of the size of what is added: float32 has 24 bits, and a sum some tens of terms in each lane
NOTHING = 1e-25  # inputs smaller than 1e-30 count as 0
ROWS = (1, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 30)
NOT_FINITE = (np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Case:
    """One call; ``check`` says what is wrong with its outputs, and is None if it must be refused."""

    operator: tuple[str, str, str]
    """Its domain, its name, and the element type of its cache, if it has one."""
    attributes: Mapping[str, Attribute]
    inputs: tuple[Array | None, ...]
    check: Check | None
    counts: tuple[str, ...] = ()
    """Attributes that are sizes."""
    fixed: tuple[int, ...] = ()
    """Inputs whose sizes follow from the others and the attributes."""
    unknown: tuple[int, ...] = ()
    """Inputs that are refused."""
    in_place: Mapping[int, int] = field(default_factory=dict)
    bfloat16: bool = False


def differs(actual: Array, expected: Array, tolerance: Array | float, or_nan: bool = False) -> str | None:
    """What is not finite must not be, and may be anything then; ``or_nan``: others may be NaN, too."""
    if actual.shape != expected.shape:
        return f"its shape is {actual.shape}, and {expected.shape} was expected"
    finite = np.isfinite(expected)
    if np.isfinite(actual[~finite]).any():
        return "it is finite where it cannot be"
    error = np.abs(np.where(finite, actual.astype(np.float64) - np.where(finite, expected, 0), 0))
    allowed = (error <= tolerance) | np.isinf(tolerance) | (np.isnan(actual) if or_nan else False)
    if not allowed.all():
        place = tuple(int(i) for i in np.argwhere(~allowed)[0])
        return f"at {place} it is {actual[place]}, and {expected[place]} was expected"
    return None


def inputs_of(random: Random, *shape: int) -> Array:
    """Of sizes as they occur; some with places that are not finite, or far too large or small."""
    x = (random.normal(size=shape) * np.exp(random.uniform(-2, 2, shape[-1]))).astype(np.float32)
    return hostile(x, random) if random.random() < 1 / 4 else x


def hostile(x: Array, random: Random) -> Array:
    """``x`` with a few such values."""
    value = (*NOT_FINITE, 3e38, -3e38, 1e-40)[random.integers(6)]
    places = random.integers(0, x.size, random.integers(1, 4))
    x = x.copy()
    x.reshape(-1)[places] = value
    return x


def split_rows(x: Array, random: Random) -> Array:
    """The same rows as an array of two, three or one more dimensions."""
    shapes = ((len(x),), (1, len(x)), (len(x), 1), (1, 1, len(x)))
    return x.reshape(*shapes[random.integers(4)], x.shape[1])


def near_ties(quotients: Array, margin: Array | float) -> Array:
    """What may round to the integer beside, if it is off by ``margin``."""
    with np.errstate(invalid="ignore"):
        return np.abs(quotients - np.floor(quotients) - 0.5) <= margin


def product(random: Random) -> Case:
    kinds = ("int4", "uint4", "int8", "uint8")
    form = WeightFormat(kinds[random.integers(4)], int(random.choice(STORED_GROUP_SIZES)))
    is_wide = random.random() < 0.05
    outputs, inputs = (int(random.integers(1, most)) for most in ((1700, 140) if is_wide else (120, 700)))
    has_half_scales, has_bias, rows = random.random() < 0.7, random.random() < 0.5, int(random.choice(ROWS))
    of_gelu = has_half_scales and random.random() < 0.4
    shape = form.packed_shape(outputs, inputs)
    scales = random.uniform(0.001, 0.1, shape[:2]).astype(np.float16 if has_half_scales else np.float32)
    zero_bytes = (outputs, -(-shape[1] * form.bits // 8))
    packed = Packed(
        random.integers(0, 256, shape, np.uint8),
        scales,
        None if form.is_symmetric else random.integers(0, 256, zero_bytes, np.uint8),
    )
    bias = random.normal(size=outputs).astype(np.float32) if has_bias else None
    x = inputs_of(random, rows, inputs)
    with np.errstate(all="ignore"):
        activated = gelu(x.astype(np.float64)).astype(np.float32) if of_gelu else x
    given = split_rows(x, random)

    def check(outputs_: list[Array]) -> str | None:
        weight = dequantize(packed, form, inputs).astype(np.float64)
        usable = np.isfinite(activated).all(1)
        used = np.where(usable[:, None], activated, 0)
        own = rounded(used, form.block_size)
        expected = own @ weight.T + (0 if bias is None else bias)
        expected[~usable] = np.nan
        tolerance = SUMS * (np.abs(own) @ np.abs(weight).T + (0 if bias is None else np.abs(bias))).max(1) + NOTHING
        margins = tolerance[:, None] + (gelu_ties(used, form, weight) if of_gelu else 0)
        margins[np.abs(expected).max(1) > 1e37] = np.inf  # sums may overflow
        return differs(outputs_[0].reshape(rows, -1), expected, margins)

    names = {"K": inputs, "N": outputs, "bits": form.bits, "block_size": form.block_size, "accuracy_level": 4}
    return Case(
        (DOMAIN if has_half_scales else MICROSOFT, "GeluMatMulNBits" if of_gelu else "MatMulNBits", ""),
        names,
        (given, packed.values, scales, packed.zero_points, None, bias),
        check,
        counts=("K", "N", "bits", "block_size"),
        fixed=(1, 2, *((3,) if packed.zero_points is not None else ()), *((5,) if has_bias else ())),
        unknown=(4,),
    )  # fmt: skip


def gelu_ties(activated: Array, form: WeightFormat, weight: Array) -> Array:
    """What results may be off as a GELU whose last bits differ rounds to the integer beside."""
    padded = np.pad(activated, ((0, 0), (0, -activated.shape[1] % form.block_size)))
    steps = np.abs(padded.reshape(len(padded), -1, form.block_size)).max(-1, keepdims=True) / 127
    steps = np.repeat(steps.reshape(len(padded), -1), form.block_size, 1)[:, : activated.shape[1]].astype(np.float64)
    quotients = np.divide(activated, steps, out=np.zeros_like(steps), where=steps > 0)
    return np.asarray((near_ties(quotients, 1e-3) * steps) @ np.abs(weight).T)


def integer_product_case(random: Random) -> Case:
    of_gelu = random.random() < 0.5
    rows, inputs, outputs = int(random.choice(ROWS)), int(random.integers(1, 700)), int(random.integers(1, 120))
    tensors = integer_tensors(random, inputs, outputs, random.choice([0.003, 0.02, 0.1]), int(random.integers(256)))
    x = inputs_of(random, rows, inputs)
    with np.errstate(all="ignore"):
        activated = gelu(x.astype(np.float64)) if of_gelu else x

    def check(outputs_: list[Array]) -> str | None:
        expected, tolerance = calibrated(tensors, activated, 1e-3 if of_gelu else 0)
        return differs(outputs_[0].reshape(rows, -1), expected, tolerance)

    name = "GeluIntegerProduct" if of_gelu else "IntegerProduct"
    inputs_ = (split_rows(x, random), *(np.asarray(tensors[name]) for name in INTEGER_LINEAR_INPUTS))
    return Case((DOMAIN, name, ""), {}, inputs_, check, fixed=(1, 2, 3, 4, 5))


def calibrated(tensors: Mapping[str, Array], x: Array, margin: Array | float) -> tuple[Array, Array]:
    """A product, and what it may be off if its inputs' quotients are off by ``margin``. NaN rounds as -inf does."""
    x = np.where(np.isnan(x), -np.inf, x)
    expected, most = integer_product(tensors, x)
    weight = np.abs(tensors["values"].astype(np.float64) * tensors["scales"].astype(np.float64)[:, None])
    scale = np.float64(tensors["x_scale"])
    ties = near_ties(np.clip(x / scale, -1e6, 1e6), margin) if np.any(margin) else np.zeros(x.shape)
    return expected, ties * scale @ weight.T + SUMS * most


def integer_mlp(random: Random) -> Case:
    rows, inputs, hidden = int(random.choice(ROWS)), int(random.integers(1, 300)), int(random.integers(1, 300))
    outputs = int(random.integers(1, 100))
    first = integer_tensors(random, inputs, hidden, 0.02, int(random.integers(256)))
    second = integer_tensors(random, hidden, outputs, 0.02, int(random.integers(256)))
    x = inputs_of(random, rows, inputs)

    def check(outputs_: list[Array]) -> str | None:
        between, tolerance = calibrated(first, x, 0)
        margin = (np.broadcast_to(1.2 * tolerance, between.shape) + 1e-5) / np.float64(second["x_scale"]) + 1e-3
        return differs(outputs_[0].reshape(rows, -1), *calibrated(second, gelu(between), margin))

    tensors = (np.asarray(part[name]) for part in (first, second) for name in INTEGER_LINEAR_INPUTS)
    inputs_ = (split_rows(x, random), *tensors)
    return Case((DOMAIN, "IntegerMlp", ""), {}, inputs_, check, fixed=tuple(range(1, 11)))


def activation(random: Random) -> Case:
    name = ("QuickGelu", "FastGelu", "SwiGlu")[random.integers(3)]
    sizes = (1, 5, 15, 16, 17, 100, 16_384, 16_385, 40_000)
    x = inputs_of(random, 1, int(random.choice(sizes)))
    up = inputs_of(random, *x.shape) if name == "SwiGlu" else None
    alpha = float(np.float32(random.uniform(-1, 2))) if name == "QuickGelu" else 1.0

    def check(outputs: list[Array]) -> str | None:
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64)
            expected = gelu(wide) if name == "FastGelu" else wide / (1 + np.exp(-alpha * wide))
            size = np.abs(expected) + np.abs(wide) / 4
            if up is not None:
                expected, size = expected * up, size * np.abs(up)
        tolerance = np.where((np.abs(expected) < 1e37) & np.isfinite(size), SUMS * size + 1e-6, np.inf)
        # The product of -inf and a power that is 0 may be NaN.
        return differs(outputs[0], expected, tolerance, or_nan=not np.isfinite(x).all())

    domain = DOMAIN if name == "SwiGlu" else MICROSOFT
    attributes = {"alpha": alpha} if name == "QuickGelu" else {}
    inputs = {"QuickGelu": (x,), "FastGelu": (x, None), "SwiGlu": (x, up)}[name]
    fixed = (1,) if up is not None else ()
    return Case((domain, name, ""), attributes, inputs, check, fixed=fixed, unknown=(1,) if name == "FastGelu" else ())
