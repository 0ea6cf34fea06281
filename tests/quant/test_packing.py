"""Packing and weight formats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusion_edge.quant.formats import BITS, CODEBOOKS, GROUPED, PER_CHANNEL, WeightFormat, group_sizes
from fusion_edge.quant.packing import dequantize, pack_zero_points, quantize, unpack_zero_points
from fusion_edge.runtime.errors import UsageError

FORMATS = [WeightFormat(kind, size) for kind in GROUPED for size in group_sizes().values() if kind not in CODEBOOKS]
matrices = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 300)), elements=st.floats(-8, 8, width=32)
)


@given(rows=matrices, fmt=st.sampled_from(FORMATS))
@example(rows=np.array([[0.33789062, -7.8125]], np.float32), fmt=WeightFormat("uint8", 32))
@example(rows=np.array([[-0.00033776]], np.float32), fmt=WeightFormat("int8", 32))  # its scale is subnormal
def test_round_trip_error_is_at_most_half_a_step(rows: np.ndarray, fmt: WeightFormat) -> None:
    packed = quantize(rows, fmt)
    scales = packed.scales
    assert packed.values.shape == fmt.packed_shape(*rows.shape)
    assert packed.values.dtype == np.uint8
    assert (scales > 0).all()
    restored = dequantize(packed, fmt, rows.shape[1])
    step = np.repeat(scales.astype(np.float64), fmt.block_size, axis=1)[:, : rows.shape[1]]
    # Rounding a scale to float16 changes it by at most 2^-11 of it, or by 2^-25 if it is subnormal. It clips a group's
    # extreme by that for each step between it and zero; in an asymmetric format, between both extremes, as the zero
    # point is rounded to fit the other one.
    steps = 1 << (fmt.bits - fmt.is_symmetric)
    tolerance = step * 0.5 + steps * np.maximum(step * 2.0**-11, 2.0**-25) + 1e-7
    assert (np.abs(restored - rows) <= tolerance).all()


@given(rows=matrices, fmt=st.sampled_from(FORMATS))
def test_dequantized_values_keep_their_codes(rows: np.ndarray, fmt: WeightFormat) -> None:
    """Unpacking and packing are inverses: dequantized values keep their codes under the same scales."""
    packed = quantize(rows, fmt)
    scales, values = packed.scales, packed.values
    restored = dequantize(packed, fmt, rows.shape[1])
    padded = np.zeros((len(rows), scales.shape[1] * fmt.block_size))
    padded[:, : rows.shape[1]] = restored
    steps = padded.reshape(*scales.shape, -1) / scales.astype(np.float64)[..., None]
    zeros = np.full(scales.shape, 1 << (fmt.bits - 1))
    if packed.zero_points is not None:
        zeros = unpack_zero_points(packed.zero_points, scales.shape[1], fmt).astype(int)
    integers = np.rint(steps).astype(int) + zeros[..., None]
    stored = values if fmt.bits == 8 else np.stack([values & 15, values >> 4], axis=-1).reshape(integers.shape)
    used = np.arange(integers[0].size).reshape(integers.shape[1:]) < rows.shape[1]
    np.testing.assert_array_equal(integers[:, used], stored[:, used])


@given(rows=matrices, fmt=st.sampled_from([fmt for fmt in FORMATS if fmt.group_size == PER_CHANNEL]))
def test_per_channel_scale_matches_one_wide_group(rows: np.ndarray, fmt: WeightFormat) -> None:
    """The number of blocks that repeat the scale does not matter."""
    packed, inputs = quantize(rows, fmt), rows.shape[1]
    assert (packed.scales == packed.scales[:, :1]).all()
    wide = WeightFormat(fmt.kind, inputs + inputs % 2)
    np.testing.assert_array_equal(dequantize(packed, fmt, inputs), dequantize(quantize(rows, wide), wide, inputs))


def test_low_nibble_first() -> None:
    row = np.zeros((1, 32), np.float32)
    row[0, 0], row[0, 1] = -8, 7
    packed = quantize(row, WeightFormat("int4", 32))
    assert packed.scales[0, 0] == 1
    assert packed.values[0, 0, 0] == 0 | 15 << 4
    assert packed.values[0, 0, 1] == 8 | 8 << 4


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_zero_points_round_trip(zero_points: np.ndarray) -> None:
    fmt = WeightFormat("uint4", 32)
    packed = pack_zero_points(zero_points, fmt)
    assert packed.shape == (len(zero_points), -(-zero_points.shape[1] // 2))
    np.testing.assert_array_equal(unpack_zero_points(packed, zero_points.shape[1], fmt), zero_points)


def test_zeros_stay_zero() -> None:
    for fmt in FORMATS:
        assert not dequantize(quantize(np.zeros((2, 256), np.float32), fmt), fmt, 256).any()


@pytest.mark.parametrize("text", ["int3", "int4:48", "fp16:32", "w8a8:channel", "", "int4:", "int8:0", "INT4"])
def test_unknown_formats_are_refused(text: str) -> None:
    if text == "int4:":
        assert WeightFormat.parse(text) == WeightFormat("int4", 128)
        return
    with pytest.raises(UsageError, match="expected fp32"):
        WeightFormat.parse(text)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_codebooks_have_no_scale_per_channel(kind: str) -> None:
    with pytest.raises(UsageError, match=f"{kind} cannot have one scale per channel; use one of {kind}:32"):
        WeightFormat.parse(f"{kind}:channel")
    with pytest.raises(UsageError, match="cannot have one scale per channel"):
        WeightFormat.parse(kind, PER_CHANNEL)


KINDS = [WeightFormat(kind) for kind in ("fp32", "fp16", "w8a8")]


@given(fmt=st.sampled_from([*FORMATS, WeightFormat("nf4", 64), *KINDS]), default=st.sampled_from([None, 0, 32, 128]))
def test_text_of_a_format_parses_to_it(fmt: WeightFormat, default: int | None) -> None:
    assert WeightFormat.parse(str(fmt), default) == fmt


def test_default_group_size() -> None:
    assert [str(WeightFormat.parse("int4", size)) for size in (None, 32, PER_CHANNEL)] == [
        "int4:128", "int4:32", "int4:channel",
    ]  # fmt: skip


def test_weight_only_8_bit_formats() -> None:
    """Codes with zero points, and activations of 8 bits, are other GEMMs."""
    assert [kind for kind in BITS if WeightFormat(kind).is_weight_only_8_bit] == ["int8", "fp8"]
