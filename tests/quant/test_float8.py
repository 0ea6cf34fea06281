"""E4M3 against ml_dtypes, and FP8 weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusion_edge.quant import float8
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import SMALLEST_SCALE, dequantize, quantize

FP8 = WeightFormat("fp8")
CODES = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
rows = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 300)), elements=st.floats(-8, 8, width=32))


def test_values() -> None:
    assert np.array_equal(float8.VALUES[CODES], CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_codes_keep_their_values() -> None:
    assert np.array_equal(float8.encode(float8.VALUES[CODES]), CODES)


def test_midpoints_round_to_even() -> None:
    positive = float8.VALUES[:127].astype(np.float64)
    midpoints = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    assert np.array_equal(float8.encode(midpoints), (np.arange(126) + 1) // 2 * 2)


@given(arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-448, 448, width=32)))
@example(np.array([0.0, -0.0, 2.0**-10, 2.0**-9, 0.015625, 0.0151, 448], np.float32))
def test_rounds_as_ml_dtypes(values: npt.NDArray[np.float32]) -> None:
    assert np.array_equal(float8.encode(values), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@given(st.floats(448, 2.0**127, width=32), st.sampled_from([1, -1]))
def test_large_values_saturate(value: float, sign: int) -> None:
    """ml_dtypes makes NaN of them."""
    (code,) = float8.encode(np.array([sign * value], np.float32))
    assert float8.VALUES[code] == sign * 448


@given(rows)
def test_error_of_weights(rows: npt.NDArray[np.float32]) -> None:
    """Half a step: 2^-4 of a value, or 2^-10 scales below the smallest normal one.

    A scale rounded to float16 is off by 2^-11 of it, or by 2^-25 if it is subnormal; the extreme is clipped by 448
    times that.
    """
    packed = quantize(rows, FP8)
    assert packed.values.shape == FP8.packed_shape(*rows.shape)
    scales = packed.scales.astype(np.float64)
    assert (scales >= SMALLEST_SCALE).all()
    error = np.abs(dequantize(packed, FP8, rows.shape[1]) - rows)
    clipped = 448 * np.maximum(scales * 2.0**-11, 2.0**-25)
    assert (error <= np.maximum(np.abs(rows) * 2.0**-4, scales * 2.0**-10) + clipped + 1e-7).all()
