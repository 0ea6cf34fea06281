"""Packing and unpacking in the layouts of prequantized checkpoints, and bitsandbytes' quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file
from support.paths import QUANTIZED
from support.prequantized_checkpoints import VARIANTS, read_fixture

from fusion_edge.export.checkpoint.prequantized import bitsandbytes, compressed_tensors, gptq
from fusion_edge.export.checkpoint.prequantized.groups import column_order, stored_group_size
from fusion_edge.export.checkpoint.prequantized.int32_packing import int32_count, pack_int32, unpack_int32
from fusion_edge.quant.codebook import CODES
from fusion_edge.quant.formats import STORED_GROUP_SIZES, WeightFormat
from fusion_edge.quant.packing import by_block, dequantize, pack, quantize, unpack
from fusion_edge.runtime.errors import FusionError

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]
each_width = pytest.mark.parametrize("bits", [4, 8])


def integers(data: st.DataObject, bits: int, multiple: int = 1) -> Bytes:
    """Draw integers ``[n,m]`` of ``bits`` bits, m divisible by ``multiple``."""
    rows, columns = data.draw(st.integers(1, 9)), multiple * data.draw(st.integers(1, 40))
    return data.draw(arrays.arrays(np.uint8, (rows, columns), elements=st.integers(0, (1 << bits) - 1)))


def words(data: st.DataObject) -> Words:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return data.draw(arrays.arrays(np.int32, shape))


@each_width
@given(data=st.data())
def test_int32_words(bits: int, data: st.DataObject) -> None:
    values = integers(data, bits)
    packed = pack_int32(values, bits)
    assert packed.dtype == np.int32
    assert packed.shape == (len(values), int32_count(values.shape[1], bits))
    np.testing.assert_array_equal(unpack_int32(packed, bits, values.shape[1]), values)
    stored = words(data)
    np.testing.assert_array_equal(pack_int32(unpack_int32(stored, bits, stored.shape[1] * 32 // bits), bits), stored)


@each_width
@given(data=st.data())
def test_gptq_weights(bits: int, data: st.DataObject) -> None:
    values = integers(data, bits)
    packed = gptq.pack_weight(values, bits)
    assert packed.shape == (int32_count(values.shape[1], bits), len(values))
    np.testing.assert_array_equal(gptq.unpack_weight(packed, bits, values.shape[1]), values)
    stored = words(data)
    inputs = len(stored) * 32 // bits
    np.testing.assert_array_equal(gptq.pack_weight(gptq.unpack_weight(stored, bits, inputs), bits), stored)


@each_width
@pytest.mark.parametrize("version", [1, 2])
@given(data=st.data())
def test_gptq_zero_points(bits: int, version: int, data: st.DataObject) -> None:
    zeros = integers(data, bits).T
    packed = gptq.pack_zeros(zeros, bits, version)
    np.testing.assert_array_equal(gptq.unpack_zeros(packed, bits, len(zeros), version), zeros)
    stored = words(data)
    rows = stored.shape[1] * 32 // bits
    unpacked = gptq.unpack_zeros(stored, bits, rows, version)
    np.testing.assert_array_equal(gptq.pack_zeros(unpacked, bits, version), stored)


@each_width
@given(data=st.data())
def test_compressed_tensors_zero_points(bits: int, data: st.DataObject) -> None:
    zeros = integers(data, bits).T
    packed = compressed_tensors.pack_zeros(zeros, bits)
    assert packed.shape == (int32_count(len(zeros), bits), zeros.shape[1])
    np.testing.assert_array_equal(compressed_tensors.unpack_zeros(packed, bits, len(zeros)), zeros)
    stored = words(data)
    rows = len(stored) * 32 // bits
    unpacked = compressed_tensors.unpack_zeros(stored, bits, rows)
    np.testing.assert_array_equal(compressed_tensors.pack_zeros(unpacked, bits), stored)


@given(data=st.data())
def test_nibbles(data: st.DataObject) -> None:
    values = integers(data, 4, multiple=2)
    np.testing.assert_array_equal(bitsandbytes.unpack_nibbles(bitsandbytes.pack_nibbles(values)), values)
    stored = integers(data, 8)
    np.testing.assert_array_equal(bitsandbytes.pack_nibbles(bitsandbytes.unpack_nibbles(stored)), stored)


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "uint8", "nf4", "fp4", "w8a8"])
@given(data=st.data())
def test_bundle_packing(kind: str, data: st.DataObject) -> None:
    form = WeightFormat(kind, 0 if kind == "w8a8" else 16)
    values = integers(data, form.bits, multiple=16)
    np.testing.assert_array_equal(unpack(pack(values, form), form), values)
    if form.has_codebook:
        np.testing.assert_array_equal(pack(values, form), bitsandbytes.pack_nibbles(values))
    stored = integers(data, 8, multiple=16)
    np.testing.assert_array_equal(pack(unpack(stored, form), form), stored)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_matches_libraries(variant: str) -> None:
    """Packing an unpacked fixture gives its bytes."""
    tensors: dict[str, npt.NDArray[Any]] = {
        name: tensor.numpy() for name, tensor in read_fixture(variant).tensors.items() if tensor.element_size() != 2
    }
    if variant.startswith("gptq"):
        bits, version = 8 if "8bit" in variant else 4, 1 if "-v1-" in variant else 2
        values = gptq.unpack_weight(tensors[".qweight"], bits, 128)
        np.testing.assert_array_equal(gptq.pack_weight(values, bits), tensors[".qweight"])
        zeros = gptq.unpack_zeros(tensors[".qzeros"], bits, 64, version)
        assert (variant.endswith("-asym")) == bool((zeros == 0).any())  # the case that version 1 borrows for
        np.testing.assert_array_equal(gptq.pack_zeros(zeros, bits, version), tensors[".qzeros"])
    elif variant.startswith("ct"):
        bits = 8 if variant == "ct-channel" else 4
        values = unpack_int32(tensors[".weight_packed"], bits, 128)
        np.testing.assert_array_equal(pack_int32(values, bits), tensors[".weight_packed"])
    else:
        stored = tensors[".weight"].reshape(64, 64)
        np.testing.assert_array_equal(bitsandbytes.pack_nibbles(bitsandbytes.unpack_nibbles(stored)), stored)
        np.testing.assert_array_equal(tensors[".weight.quant_map"], CODES[variant.split("-")[1]])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_rounding_matches_bitsandbytes(kind: str, block: int) -> None:
    """This includes ties between two codes, blocks of zeros, and blocks of denormal numbers."""
    fixture = load_file(QUANTIZED / "bnb-quantizer.safetensors")
    form = WeightFormat(kind, block)
    packed = quantize(fixture["weights"], form)
    np.testing.assert_array_equal(packed.values.reshape(-1, 1), fixture[f"{kind}.{block}.packed"])
    np.testing.assert_array_equal(packed.scales.reshape(-1), fixture[f"{kind}.{block}.absmax"])


ROWS = arrays.arrays(np.float32, (3, 64), elements=st.floats(-8, 8, width=32, allow_subnormal=False))


@given(rows=ROWS, kind=st.sampled_from(list(CODES)))
def test_codebooks_give_the_nearest_number(rows: npt.NDArray[np.float32], kind: str) -> None:
    form = WeightFormat(kind, 32)
    packed = quantize(rows, form)
    restored = dequantize(packed, form, 64).reshape(3, 2, 32)
    choices = CODES[kind] * packed.scales[..., None]
    errors = np.abs(rows.reshape(3, 2, 32, 1) - choices[:, :, None, :]).min(axis=3)
    assert (np.abs(rows.reshape(restored.shape) - restored) <= errors + 1e-6 * packed.scales[..., None]).all()


@given(st.integers(1, 8192), st.integers(1, 8192))
def test_group_sizes(group: int, inputs: int) -> None:
    """A stored group never spans two groups, and exists unless the group size has too few factors of two."""
    try:
        size = stored_group_size("tensor", group, inputs)
    except FusionError:
        assert group % 16
        assert group < inputs
        return
    assert size in STORED_GROUP_SIZES
    groups = np.arange(-(-inputs // group))[None]
    stored = by_block(groups, group, inputs, size)
    np.testing.assert_array_equal(stored.repeat(size, axis=1)[0, :inputs], np.arange(inputs) // group)


@given(st.integers(1, 9), st.integers(1, 9), st.randoms())
def test_column_order(group: int, count: int, random: Any) -> None:
    groups = [i // group for i in range(group * count)]
    assert column_order("g_idx", np.array(groups, np.int32), group) is None
    random.shuffle(groups)
    order = column_order("g_idx", np.array(groups, np.int32), group)
    brought = groups if order is None else [groups[i] for i in order]
    assert brought == sorted(groups)
    with pytest.raises(FusionError, match=f"does not assign {group} columns to each"):
        column_order("g_idx", np.array([-1, *groups[1:]], np.int32), group)
