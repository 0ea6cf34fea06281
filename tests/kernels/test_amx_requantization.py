"""Error of 4-bit weights in AMX tiles, which hold them as int8."""

from __future__ import annotations

import numpy as np
import pytest
from support.linear_references import RATIO_ONE, SUPERBLOCK, nibbles, requantized

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import Packed, dequantize, quantize


def random_weight(kind: str, group_size: int) -> tuple[WeightFormat, Packed]:
    """Return weights whose groups have different scales."""
    generator = np.random.default_rng(0)
    spread = np.exp(generator.normal(size=(50, 1024 // group_size, 1)))
    rows = generator.normal(0.2, size=(50, 1024 // group_size, group_size)) * spread
    weight_format = WeightFormat(kind, group_size)
    return weight_format, quantize(rows.reshape(50, 1024).astype(np.float32), weight_format)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_error_is_at_most_a_sixteenth_of_a_step_of_int4(kind: str, group_size: int) -> None:
    """Half a step of int8 plus the rounding of a ratio; a step of int8 is 1/8 or less of the largest group's."""
    weight_format, packed = random_weight(kind, group_size)
    error = np.abs(requantized(packed, weight_format, 1024) - dequantize(packed, weight_format, 1024))
    zeros = np.full(packed.scales.shape, 8)
    if packed.zero_points is not None:
        zeros = nibbles(packed.zero_points)[:, : packed.scales.shape[1]]
    levels = 127 // np.maximum(zeros, 15 - zeros)
    count = max(SUPERBLOCK // group_size, 1)
    steps = (packed.scales.astype(np.float64) / levels).reshape(50, -1, count).max(-1)
    most = steps * (0.5 + 15 / (2 * RATIO_ONE)) * (1 + 1e-6)
    assert (error.reshape(50, -1, count * group_size) <= most[:, :, None]).all()
    largest = packed.scales.astype(np.float64).reshape(50, -1, count).max(-1)
    assert (error.reshape(50, -1, count * group_size) <= largest[:, :, None] * 0.0635).all()


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_the_group_with_the_largest_step_is_exact(kind: str) -> None:
    weight_format, packed = random_weight(kind, 128)
    error = np.abs(requantized(packed, weight_format, 1024) - dequantize(packed, weight_format, 1024))
    by_group = error.reshape(50, -1, SUPERBLOCK // 128, 128).max(-1)
    scales = packed.scales.astype(np.float64).reshape(50, -1, SUPERBLOCK // 128)
    exact = by_group <= 15 * scales * 2.0**-22  # shared scales are rounded to float32 twice
    assert exact.any(-1).all()
    assert not exact.all()
