"""The layout of ONNX's own DequantizeLinear, which TensorRT reads: integers around 0, no zero points.

INT4 weights are ``[K,N]`` in blocks along K, the form that a product ``x @ w`` reads: two columns share a byte, the
first in its low nibble. INT8 weights are ``[N,K]`` bytes with one scale a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import Packed, pack, unpack

SIGN = {4: np.uint8(8), 8: np.uint8(128)}
"""Turning this bit makes v, which stands for v - 2^(b-1), the two's complement of that."""


def to_dequantize_linear(
    packed: Packed, form: WeightFormat, inputs: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]:
    """Values and scales of some rows: ``[K, n/2]``, ``[K/group, n]`` of INT4 (n even), ``[n, K]``, ``[n]`` of INT8.

    The format is symmetric, and of INT8 has one scale a row.
    """
    codes = unpack(packed.values, form).reshape(len(packed.values), -1)[:, :inputs] ^ SIGN[form.bits]
    if form.bits == 8:
        return codes, packed.scales[:, 0]
    return codes[::2].T | (codes[1::2].T << 4), packed.scales.T


def from_dequantize_linear(
    values: npt.NDArray[np.uint8], scales: npt.NDArray[np.floating], form: WeightFormat
) -> Packed:
    """Inverse of :func:`to_dequantize_linear`, where K is whole blocks of an INT4 format."""
    if form.bits == 8:
        rows, inputs = values.shape
        blocks, block = form.blocks(inputs), form.block(inputs)
        codes = np.pad(values ^ SIGN[8], ((0, 0), (0, blocks * block - inputs)), constant_values=128)
        repeated = np.repeat(scales[:, None], blocks, axis=1)
        return Packed(pack(codes.reshape(rows, blocks, block), form), repeated)
    inputs, rows = len(values), 2 * values.shape[1]
    codes = np.stack([values & 15, values >> 4], axis=-1).reshape(inputs, rows).T ^ SIGN[4]
    return Packed(pack(np.ascontiguousarray(codes).reshape(rows, form.blocks(inputs), -1), form), scales.T)
