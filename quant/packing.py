"""Round-to-nearest group quantization and its byte layout, that of ONNX Runtime's MatMulNBits.

A group is stored as one block, with its scale; rows with one scale are cut into blocks, and it is repeated.

A stored value v of b bits means ``(v - zero_point) * scale``; symmetric formats have no zero points, theirs is 2^(b-1).
Two 4-bit values share a byte, the first in the low nibble. Scales are strictly positive (TensorRT asks for that) and
rounded to float16 *before* the values are, so that the stored pair is the best that the stored scale allows.

In formats with a codebook v means ``CODES[v] * scale``; MatMulBnb4 has the first value in the *high* nibble.

``w8a8`` (QuantizeLinear, DequantizeLinear) is the same with one group a row, stored as signed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusion_edge.quant import codebook
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.errors import FusionError

Number = TypeVar("Number", bound=np.generic)
SMALLEST_SCALE = 2.0**-20  # a float16 subnormal of still four bits; smaller ones round too coarsely


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of a weight as they are stored."""

    values: npt.NDArray[np.uint8]
    """``[n, blocks, block size * bits / 8]``."""
    scales: npt.NDArray[np.floating]
    """``[n, blocks]``; float32 where a quantized checkpoint has such, and of codebooks; else float16."""
    zero_points: npt.NDArray[np.uint8] | None = None
    """``[n, blocks * bits / 8]``, rounded up: two of 4 bits to a byte; None if symmetric."""


def check_range(parameter: str, values: npt.NDArray[np.float32], form: WeightFormat) -> None:
    """Raise :class:`FusionError` for values of a parameter that its format does not reach."""
    if np.isfinite(form.largest) and (extent := float(np.abs(values).max())) > form.largest:
        raise FusionError(
            f"{parameter} holds values up to {extent:.3g}; {form} reaches {form.largest:.3g}. The checkpoint is "
            "damaged: fetch or save it again; or it needs a wider format there, such as fp32."
        )


def quantize(rows: npt.NDArray[np.float32], form: WeightFormat) -> Packed:
    """Round ``[n,K]``, in the range of the format (:func:`check_range`).

    The scale is the smallest for which both ends of a group fit: max/(2^(b-1)-1) or -min/2^(b-1) if symmetric, else
    (max-min)/(2^b-1) with 0 between them; but at least :data:`SMALLEST_SCALE`.
    """
    if form.has_codebook:
        codes, absmax = codebook.quantize(rows, form.kind, form.group_size)
        return Packed(pack(codes.reshape(*absmax.shape, -1), form), absmax)
    count, inputs = rows.shape
    groups, half = form.groups(inputs), 1 << (form.bits - 1)
    if missing := groups * form.group(inputs) - inputs:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    grouped = rows.reshape(count, groups, form.group(inputs))
    least, largest = grouped.min(axis=2), grouped.max(axis=2)
    if form.is_symmetric:
        extent = np.maximum(largest / np.float32(half - 1), least / np.float32(-half))
    else:
        least, largest = np.minimum(least, 0), np.maximum(largest, 0)
        extent = (largest - least) / np.float32(2 * half - 1)
    scales = np.maximum(extent, SMALLEST_SCALE).astype(np.float16)
    inverse = 1 / scales.astype(np.float32)
    scaled = grouped * inverse[:, :, None]
    zeros = np.full(scales.shape, half, np.uint8)
    if not form.is_symmetric:
        zeros = np.clip(np.rint(-least * inverse), 0, 2 * half - 1).astype(np.uint8)
    middle = np.float32(half) if form.is_symmetric else zeros[:, :, None]
    scaled += middle + np.float32(0.5)  # the cast below truncates: this rounds
    np.clip(scaled, 0, 2 * half - 1, out=scaled)
    return store(scaled.astype(np.uint8).reshape(count, -1)[:, :inputs], scales, zeros, form)


def store(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.floating], zeros: npt.NDArray[np.uint8], form: WeightFormat
) -> Packed:
    """Integers ``[n,K]`` as they are stored, with the scales and zero points ``[n, groups]`` of a format that is no
    codebook. The rest of a partial block stands for zero.
    """
    count, inputs = codes.shape
    group, block = form.group(inputs), form.block(inputs)
    scales, zeros = by_block(scales, group, inputs, block), by_block(zeros, group, inputs, block)
    if missing := form.blocks(inputs) * block - inputs:
        codes = np.concatenate([codes, np.repeat(zeros[:, -1:], missing, axis=1)], axis=1)
    zero_points = None if form.is_symmetric else pack_zero_points(zeros, form)
    return Packed(pack(np.ascontiguousarray(codes).reshape(count, -1, block), form), scales, zero_points)


def by_block(values: npt.NDArray[Number], group: int, inputs: int, block: int) -> npt.NDArray[Number]:
    """``[n, groups]`` -> ``[n, blocks]``: what belongs to each block of ``block`` out of ``inputs`` channels, a part of
    a group of ``group`` or all of it.
    """
    if group == block:
        return values
    repeated: npt.NDArray[Number] = values[:, np.arange(0, inputs, block) // group]
    return repeated


def dequantize(packed: Packed, form: WeightFormat, inputs: int) -> npt.NDArray[np.float32]:
    """Inverse of :func:`quantize` up to rounding: float32 ``[n, inputs]``."""
    codes = unpack(packed.values, form)
    values = codebook.CODES[form.kind].take(codes) if form.has_codebook else codes.astype(np.float32)
    if packed.zero_points is not None:
        values -= unpack_zero_points(packed.zero_points, packed.scales.shape[1], form)[:, :, None]
    elif not form.has_codebook:
        values -= np.float32(1 << (form.bits - 1))
    values *= packed.scales.astype(np.float32)[:, :, None]
    rows: npt.NDArray[np.float32] = values.reshape(len(values), -1)[:, :inputs]
    return rows


def pack_zero_points(zero_points: npt.NDArray[np.uint8], form: WeightFormat) -> npt.NDArray[np.uint8]:
    """``[n, blocks]`` -> ``[n, blocks * bits / 8]``, rounded up; the first of two in the low nibble."""
    if form.bits == 8:
        return zero_points
    even = np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2)))
    packed: npt.NDArray[np.uint8] = even[:, ::2] | np.left_shift(even[:, 1::2], np.uint8(4))
    return packed


def unpack_zero_points(packed: npt.NDArray[np.uint8], blocks: int, form: WeightFormat) -> npt.NDArray[np.uint8]:
    """Inverse of :func:`pack_zero_points`."""
    if form.bits == 8:
        return packed
    pairs: npt.NDArray[np.uint8] = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(len(packed), -1)[:, :blocks]


def pack(values: npt.NDArray[np.uint8], form: WeightFormat) -> npt.NDArray[np.uint8]:
    """``[..., block size]`` -> ``[..., block size * bits / 8]``."""
    if form.rounds_inputs:
        signed: npt.NDArray[np.uint8] = values ^ np.uint8(128)
        return signed  # the bytes of v - 128 as a signed number
    if form.bits == 8:
        return values
    pairs: npt.NDArray[np.uint16] = values.view("<u2")  # first value in the low byte
    # With a codebook the first value goes to the high nibble.
    joined = (pairs << 4) | (pairs >> 8) if form.has_codebook else pairs | (pairs >> 4)
    return joined.astype(np.uint8)  # the cast drops the high byte


def unpack(packed: npt.NDArray[np.uint8], form: WeightFormat) -> npt.NDArray[np.uint8]:
    """Inverse of :func:`pack`."""
    if form.rounds_inputs:
        unsigned: npt.NDArray[np.uint8] = packed ^ np.uint8(128)
        return unsigned
    if form.bits == 8:
        return packed
    wide = packed.astype("<u2")
    spread = (wide >> 4) | (wide << 8) if form.has_codebook else wide | (wide << 4)
    pairs: npt.NDArray[np.uint16] = (spread & 0x0F0F).astype(np.uint16)
    return pairs.view(np.uint8)
