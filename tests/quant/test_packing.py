"""Packing and weight formats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusion_edge.quant.bit_allocation import stored_bits
from fusion_edge.quant.formats import CODEBOOKS, GROUPED, PER_CHANNEL, WeightFormat, group_sizes
from fusion_edge.quant.packing import dequantize, pack_zero_points, quantize, unpack_zero_points
from fusion_edge.runtime.errors import UsageError

FORMS = [WeightFormat(kind, size) for kind in GROUPED for size in group_sizes().values() if kind not in CODEBOOKS]
matrices = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 300)), elements=st.floats(-8, 8, width=32)
)


@given(rows=matrices, form=st.sampled_from(FORMS))
@example(rows=np.array([[0.33789062, -7.8125]], np.float32), form=WeightFormat("uint8", 32))
def test_every_value_comes_back_within_half_a_step(rows: np.ndarray, form: WeightFormat) -> None:
    packed = quantize(rows, form)
    scales = packed.scales
    assert packed.values.shape == form.packed_shape(*rows.shape)
    assert packed.values.dtype == np.uint8
    assert (scales > 0).all()
    restored = dequantize(packed, form, rows.shape[1])
    step = np.repeat(scales.astype(np.float64), form.block_size, axis=1)[:, : rows.shape[1]]
    # Rounding a scale to float16 clips a group's extreme by at most 2^-11 of the steps between it and zero; in an
    # asymmetric format, of the steps between both extremes, as the zero point is rounded to fit the other one.
    steps = 1 << (form.bits - form.is_symmetric)
    tolerance = step * (0.5 + steps * 2.0**-11) + 1e-7
    assert (np.abs(restored - rows) <= tolerance).all()


@given(rows=matrices, form=st.sampled_from(FORMS))
def test_what_was_dequantized_is_stored_unchanged(rows: np.ndarray, form: WeightFormat) -> None:
    """Unpacking and packing are inverses: dequantized values keep their codes under the same scales."""
    packed = quantize(rows, form)
    scales, values = packed.scales, packed.values
    restored = dequantize(packed, form, rows.shape[1])
    padded = np.zeros((len(rows), scales.shape[1] * form.block_size))
    padded[:, : rows.shape[1]] = restored
    steps = padded.reshape(*scales.shape, -1) / scales.astype(np.float64)[..., None]
    zeros = np.full(scales.shape, 1 << (form.bits - 1))
    if packed.zero_points is not None:
        zeros = unpack_zero_points(packed.zero_points, scales.shape[1], form).astype(int)
    integers = np.rint(steps).astype(int) + zeros[..., None]
    stored = values if form.bits == 8 else np.stack([values & 15, values >> 4], axis=-1).reshape(integers.shape)
    used = np.arange(integers[0].size).reshape(integers.shape[1:]) < rows.shape[1]
    np.testing.assert_array_equal(integers[:, used], stored[:, used])


@given(rows=matrices, form=st.sampled_from([form for form in FORMS if form.group_size == PER_CHANNEL]))
def test_one_scale_a_row_is_that_of_a_group_as_wide(rows: np.ndarray, form: WeightFormat) -> None:
    """However many blocks it is repeated in."""
    packed, inputs = quantize(rows, form), rows.shape[1]
    assert (packed.scales == packed.scales[:, :1]).all()
    wide = WeightFormat(form.kind, inputs + inputs % 2)
    np.testing.assert_array_equal(dequantize(packed, form, inputs), dequantize(quantize(rows, wide), wide, inputs))


@given(rows=matrices, form=st.sampled_from(FORMS))
def test_stored_bits_are_those_stored(rows: np.ndarray, form: WeightFormat) -> None:
    packed = quantize(rows, form)
    parts = [part for part in (packed.values, packed.scales, packed.zero_points) if part is not None]
    # The last 4-bit zero point of a row may have a byte of its own.
    unused = 4 * len(rows) * (packed.scales.shape[1] % 2) if form.kind == "uint4" else 0
    assert stored_bits(rows.shape, form) == 8 * sum(part.nbytes for part in parts) - unused


def test_low_nibble_first() -> None:
    row = np.zeros((1, 32), np.float32)
    row[0, 0], row[0, 1] = -8, 7
    packed = quantize(row, WeightFormat("int4", 32))
    assert packed.scales[0, 0] == 1
    assert packed.values[0, 0, 0] == 0 | 15 << 4
    assert packed.values[0, 0, 1] == 8 | 8 << 4


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_zero_points_come_back(zero_points: np.ndarray) -> None:
    form = WeightFormat("uint4", 32)
    packed = pack_zero_points(zero_points, form)
    assert packed.shape == (len(zero_points), -(-zero_points.shape[1] // 2))
    np.testing.assert_array_equal(unpack_zero_points(packed, zero_points.shape[1], form), zero_points)


def test_a_group_of_zeros_stays_zero() -> None:
    for form in FORMS:
        assert not dequantize(quantize(np.zeros((2, 256), np.float32), form), form, 256).any()


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


@given(form=st.sampled_from([*FORMS, WeightFormat("nf4", 64), *KINDS]), default=st.sampled_from([None, 0, 32, 128]))
def test_a_format_is_read_as_it_is_written(form: WeightFormat, default: int | None) -> None:
    assert WeightFormat.parse(str(form), default) == form


def test_a_kind_has_the_group_size_asked_for() -> None:
    assert [str(WeightFormat.parse("int4", size)) for size in (None, 32, PER_CHANNEL)] == [
        "int4:128", "int4:32", "int4:channel",
    ]  # fmt: skip
