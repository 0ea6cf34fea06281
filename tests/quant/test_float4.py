"""E2M1 against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusion_edge.quant import float4

CODES = np.arange(16, dtype=np.uint8)
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)


def test_values() -> None:
    expected = CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(float4.VALUES, expected)
    assert np.array_equal(np.signbit(float4.VALUES), np.signbit(expected))
    assert max(float4.VALUES) == float4.LARGEST


def test_codes_keep_their_values() -> None:
    assert np.array_equal(float4.encode(float4.VALUES), CODES)


def test_midpoints_round_to_even() -> None:
    assert float4.encode(MIDPOINTS).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert float4.encode(-MIDPOINTS).tolist() == [8, 10, 10, 12, 12, 14, 14]


@given(arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-6, 6, width=32)))
@example(np.concatenate([np.nextafter(MIDPOINTS, np.float32(0)), np.nextafter(MIDPOINTS, np.float32(9))]))
def test_rounds_as_ml_dtypes(values: npt.NDArray[np.float32]) -> None:
    assert np.array_equal(float4.encode(values), values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


@given(st.floats(6, 2.0**127, width=32), st.sampled_from([1, -1]))
def test_large_values_saturate(value: float, sign: int) -> None:
    (code,) = float4.encode(np.array([sign * value], np.float32))
    assert float4.VALUES[code] == sign * 6
