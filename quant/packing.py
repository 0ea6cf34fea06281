"""Round-to-nearest group quantization and its byte layout, that of ONNX Runtime's MatMulNBits.

Symmetric: a stored value v of b bits means ``(v - 2^(b-1)) * scale``. Two 4-bit values share a byte, the first
in the low nibble. Scales are strictly positive (TensorRT asks for that) and rounded to float16 *before* the
values are, so that the stored pair is the best that the stored scale allows.

``w8a8`` (QuantizeLinear, DequantizeLinear) is the same with one group a row, stored as signed bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.quant.formats import WeightFormat

SMALLEST_SCALE = 2.0**-20  # a float16 subnormal of still four bits; smaller ones round too coarsely


def quantize(
    rows: npt.NDArray[np.float32], form: WeightFormat
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """``[n,K]`` -> packed ``[n, groups, group_size * bits / 8]`` and scales ``[n, groups]``.

    The scale is the smallest for which both ends of a group fit, max/(2^(b-1)-1) or -min/2^(b-1), but at least
    :data:`SMALLEST_SCALE`.
    """
    count, inputs = rows.shape
    groups, half = form.groups(inputs), 1 << (form.bits - 1)
    if missing := groups * form.group(inputs) - inputs:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    grouped = rows.reshape(count, groups, form.group(inputs))
    extent = np.maximum(grouped.max(axis=2) / np.float32(half - 1), grouped.min(axis=2) / np.float32(-half))
    scales = np.maximum(extent, SMALLEST_SCALE).astype(np.float16)
    scaled = grouped * (1 / scales.astype(np.float32))[:, :, None]
    scaled += np.float32(half + 0.5)  # the cast below truncates: this rounds
    np.clip(scaled, 0, 2 * half - 1, out=scaled)
    return pack(scaled.astype(np.uint8), form), scales


def dequantize(
    packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.float16], form: WeightFormat, inputs: int
) -> npt.NDArray[np.float32]:
    """Inverse of :func:`quantize` up to rounding: float32 ``[n, inputs]``."""
    half = 1 << (form.bits - 1)
    values = unpack(packed, form).astype(np.float32) - np.float32(half)
    values *= scales.astype(np.float32)[:, :, None]
    rows: npt.NDArray[np.float32] = values.reshape(len(values), -1)[:, :inputs]
    return rows


def pack(values: npt.NDArray[np.uint8], form: WeightFormat) -> npt.NDArray[np.uint8]:
    """``[..., group_size]`` -> ``[..., group_size * bits / 8]``."""
    if form.rounds_inputs:
        signed: npt.NDArray[np.uint8] = values ^ np.uint8(128)
        return signed  # the bytes of v - 128 as a signed number
    if form.bits == 8:
        return values
    pairs: npt.NDArray[np.uint16] = values.view("<u2")  # first value in the low byte
    return (pairs | (pairs >> 4)).astype(np.uint8)  # the cast drops the high byte


def unpack(packed: npt.NDArray[np.uint8], form: WeightFormat) -> npt.NDArray[np.uint8]:
    """Inverse of :func:`pack`."""
    if form.rounds_inputs:
        unsigned: npt.NDArray[np.uint8] = packed ^ np.uint8(128)
        return unsigned
    if form.bits == 8:
        return packed
    wide = packed.astype("<u2")
    pairs: npt.NDArray[np.uint16] = ((wide << 4) | wide) & 0x0F0F
    return pairs.view(np.uint8)
