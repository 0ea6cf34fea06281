"""Round-to-nearest group quantization, and packing in the byte layout of ONNX Runtime's MatMulNBits.

A group is stored as one block with its scale. A per-channel row is stored as several blocks that repeat the scale.

A code q of b bits means ``(q - zero_point) * scale``. Symmetric formats store no zero points: it is always 2^(b-1). Two
4-bit codes share a byte, the first in the low nibble. Scales are strictly positive (TensorRT requires it). They are
rounded to float16 *before* the codes are computed: the codes are optimal for the stored scale.

With a codebook, a code means ``CODES[q] * scale``. MatMulBnb4 stores the first code in the *high* nibble.

``w8a8`` (QuantizeLinear, DequantizeLinear) has one group per row and stores signed bytes. ``fp8`` has one group per row
and stores E4M3 bytes. ``nvfp4`` is packed by ``quant/nvfp4.py``; its scales include the tensor's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusion_edge.quant import codebook, float4, float8
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.errors import FusionError

LEVELS = {"fp8": float8.VALUES, "nvfp4": float4.VALUES, **codebook.CODES}
"""Value of each code, by kind that is no integer."""
Number = TypeVar("Number", bound=np.generic)
SMALLEST_SCALE = 2.0**-20  # a float16 subnormal with four significant bits; smaller ones are too coarse


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed rows of a weight."""

    values: npt.NDArray[np.uint8]
    """``[n, blocks, block size * bits / 8]``."""
    scales: npt.NDArray[np.floating]
    """``[n, blocks]``; float32 for codebooks, nvfp4 and where a prequantized checkpoint has them, else float16."""
    zero_points: npt.NDArray[np.uint8] | None = None
    """``[n, blocks * bits / 8]``, rounded up: two 4-bit zero points per byte. None if symmetric."""


def check_range(parameter: str, values: npt.NDArray[np.float32], fmt: WeightFormat) -> None:
    """Raise :class:`FusionError` for values of a parameter outside the range of its format."""
    if np.isfinite(fmt.max_value) and (extent := float(np.abs(values).max())) > fmt.max_value:
        raise FusionError(
            f"{parameter} holds values up to {extent:.3g}; the range of {fmt} ends at {fmt.max_value:.3g}. If the "
            "checkpoint is damaged, fetch or save it again; otherwise use a wider format for it, such as fp32."
        )


def quantize(rows: npt.NDArray[np.float32], fmt: WeightFormat) -> Packed:
    """Round ``[n,K]`` to nearest and pack it. Values are within the range of the format (:func:`check_range`).

    The scale is the smallest one that covers a group: the larger of max/(2^(b-1)-1) and -min/2^(b-1) if symmetric, else
    (max-min)/(2^b-1) with 0 between them; at least :data:`SMALLEST_SCALE`. ``nvfp4`` needs all rows of a weight, for
    their scale (``quant/nvfp4.py``).
    """
    if fmt.has_codebook:
        codes, absmax = codebook.quantize(rows, fmt.kind, fmt.group_size)
        return Packed(pack(codes.reshape(*absmax.shape, -1), fmt), absmax)
    if fmt.kind == "fp8":
        return _quantize_float8(rows)
    count, inputs = rows.shape
    groups, half = fmt.groups(inputs), 1 << (fmt.bits - 1)
    if missing := groups * fmt.group(inputs) - inputs:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    grouped = rows.reshape(count, groups, fmt.group(inputs))
    least, largest = grouped.min(axis=2), grouped.max(axis=2)
    if fmt.is_symmetric:
        extent = np.maximum(largest / np.float32(half - 1), least / np.float32(-half))
    else:
        least, largest = np.minimum(least, 0), np.maximum(largest, 0)
        extent = (largest - least) / np.float32(2 * half - 1)
    scales = np.maximum(extent, SMALLEST_SCALE).astype(np.float16)
    inverse = 1 / scales.astype(np.float32)
    scaled = grouped * inverse[:, :, None]
    zeros = np.full(scales.shape, half, np.uint8)
    if not fmt.is_symmetric:
        zeros = np.clip(np.rint(-least * inverse), 0, 2 * half - 1).astype(np.uint8)
    middle = np.float32(half) if fmt.is_symmetric else zeros[:, :, None]
    scaled += middle + np.float32(0.5)  # rounds: the cast below truncates
    np.clip(scaled, 0, 2 * half - 1, out=scaled)
    return pack_codes(scaled.astype(np.uint8).reshape(count, -1)[:, :inputs], scales, zeros, fmt)


def _quantize_float8(rows: npt.NDArray[np.float32]) -> Packed:
    """Round ``[n,K]`` to E4M3; the largest value of each row becomes the largest one of the format."""
    extent = np.abs(rows).max(axis=1, keepdims=True) / float8.LARGEST
    scales = np.maximum(extent, SMALLEST_SCALE).astype(np.float16)
    codes = float8.encode(rows / scales.astype(np.float32))
    return Packed(codes[:, None], scales)


def pack_codes(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.floating], zeros: npt.NDArray[np.uint8], fmt: WeightFormat
) -> Packed:
    """Pack codes ``[n,K]`` with their scales and zero points ``[n, groups]``, of a format without a codebook.

    Partial blocks are padded with zeros.
    """
    count, inputs = codes.shape
    group, block = fmt.group(inputs), fmt.block(inputs)
    scales, zeros = by_block(scales, group, inputs, block), by_block(zeros, group, inputs, block)
    if missing := fmt.blocks(inputs) * block - inputs:
        codes = np.concatenate([codes, np.repeat(zeros[:, -1:], missing, axis=1)], axis=1)
    zero_points = None if fmt.is_symmetric else pack_zero_points(zeros, fmt)
    return Packed(pack(np.ascontiguousarray(codes).reshape(count, -1, block), fmt), scales, zero_points)


def by_block(values: npt.NDArray[Number], group: int, inputs: int, block: int) -> npt.NDArray[Number]:
    """Repeat each group's value for its blocks: ``[n, groups]`` -> ``[n, blocks]``.

    ``group`` and ``block`` are sizes in channels, of ``inputs`` channels in a row.
    """
    if group == block:
        return values
    repeated: npt.NDArray[Number] = values[:, np.arange(0, inputs, block) // group]
    return repeated


def dequantize(packed: Packed, fmt: WeightFormat, inputs: int) -> npt.NDArray[np.float32]:
    """Return the values of packed rows, float32 ``[n, inputs]``."""
    codes = unpack(packed.values, fmt)
    values = codes.astype(np.float32) if fmt.is_integer else LEVELS[fmt.kind].take(codes)
    if packed.zero_points is not None:
        values -= unpack_zero_points(packed.zero_points, packed.scales.shape[1], fmt)[:, :, None]
    elif fmt.is_integer:
        values -= np.float32(1 << (fmt.bits - 1))
    values *= packed.scales.astype(np.float32)[:, :, None]
    rows: npt.NDArray[np.float32] = values.reshape(len(values), -1)[:, :inputs]
    return rows


def pack_zero_points(zero_points: npt.NDArray[np.uint8], fmt: WeightFormat) -> npt.NDArray[np.uint8]:
    """Pack ``[n, blocks]`` -> ``[n, ceil(blocks * bits / 8)]``; the first of two 4-bit values is in the low nibble."""
    if fmt.bits == 8:
        return zero_points
    even = np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2)))
    packed: npt.NDArray[np.uint8] = even[:, ::2] | np.left_shift(even[:, 1::2], np.uint8(4))
    return packed


def unpack_zero_points(packed: npt.NDArray[np.uint8], blocks: int, fmt: WeightFormat) -> npt.NDArray[np.uint8]:
    """Invert :func:`pack_zero_points`."""
    if fmt.bits == 8:
        return packed
    pairs: npt.NDArray[np.uint8] = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return pairs.reshape(len(packed), -1)[:, :blocks]


def pack(values: npt.NDArray[np.uint8], fmt: WeightFormat) -> npt.NDArray[np.uint8]:
    """Pack codes: ``[..., block size]`` -> ``[..., block size * bits / 8]``."""
    if fmt.kind == "w8a8":
        signed: npt.NDArray[np.uint8] = values ^ np.uint8(128)
        return signed  # q - 128 as a signed byte
    if fmt.bits == 8:
        return values
    pairs: npt.NDArray[np.uint16] = values.view("<u2")  # first code in the low byte
    # With a codebook the first code is in the high nibble.
    joined = (pairs << 4) | (pairs >> 8) if fmt.has_codebook else pairs | (pairs >> 4)
    return joined.astype(np.uint8)  # the cast drops the high byte


def unpack(packed: npt.NDArray[np.uint8], fmt: WeightFormat) -> npt.NDArray[np.uint8]:
    """Invert :func:`pack`."""
    if fmt.kind == "w8a8":
        unsigned: npt.NDArray[np.uint8] = packed ^ np.uint8(128)
        return unsigned
    if fmt.bits == 8:
        return packed
    wide = packed.astype("<u2")
    spread = (wide >> 4) | (wide << 8) if fmt.has_codebook else wide | (wide << 4)
    pairs: npt.NDArray[np.uint16] = (spread & 0x0F0F).astype(np.uint16)
    return pairs.view(np.uint8)
