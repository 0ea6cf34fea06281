"""Weight layout of ONNX DequantizeLinear, which TensorRT reads: signed integers, no zero points.

INT4 weights are ``[K,N]`` with blocks along K, so that ``x @ w`` needs no transpose; two columns share a byte, the
first in the low nibble. INT8 and FP8 weights are ``[N,K]`` bytes with one scale per row. NVFP4 weights are ``[N,K]``
with blocks along K, two inputs in a byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import Packed, pack, unpack

SIGN_BIT = {4: np.uint8(8), 8: np.uint8(128)}
"""Flipping this bit turns an unsigned code v, which means v - 2^(b-1), into two's complement."""


def to_dequantize_linear(
    packed: Packed, fmt: WeightFormat, inputs: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.floating]]:
    """Convert n rows: values and scales ``[K, n/2]``, ``[K/group, n]`` of INT4 (n even); ``[n, K]``, ``[n]`` of 8 bits;
    ``[n, K/2]``, ``[n, K/16]`` of NVFP4.

    The format is symmetric; 8-bit formats have one scale per row.
    """
    if fmt.kind == "nvfp4":
        return packed.values.reshape(len(packed.values), -1), packed.scales
    if fmt.kind == "fp8":
        return packed.values[:, 0], packed.scales[:, 0]
    codes = unpack(packed.values, fmt).reshape(len(packed.values), -1)[:, :inputs] ^ SIGN_BIT[fmt.bits]
    if fmt.bits == 8:
        return codes, packed.scales[:, 0]
    return codes[::2].T | (codes[1::2].T << np.uint8(4)), packed.scales.T


def from_dequantize_linear(
    values: npt.NDArray[np.uint8], scales: npt.NDArray[np.floating], fmt: WeightFormat
) -> Packed:
    """Invert :func:`to_dequantize_linear`. K is a multiple of the block size of a 4-bit format."""
    if fmt.kind == "nvfp4":
        return Packed(values.reshape(*scales.shape, -1), scales)
    if fmt.kind == "fp8":
        return Packed(values[:, None], scales[:, None])
    if fmt.bits == 8:
        rows, inputs = values.shape
        blocks, block = fmt.blocks(inputs), fmt.block(inputs)
        codes = np.pad(values ^ SIGN_BIT[8], ((0, 0), (0, blocks * block - inputs)), constant_values=128)
        repeated = np.repeat(scales[:, None], blocks, axis=1)
        return Packed(pack(codes.reshape(rows, blocks, block), fmt), repeated)
    inputs, rows = len(values), 2 * values.shape[1]
    codes = np.stack([values & np.uint8(15), values >> np.uint8(4)], axis=-1).reshape(inputs, rows).T ^ SIGN_BIT[4]
    return Packed(pack(np.ascontiguousarray(codes).reshape(rows, fmt.blocks(inputs), -1), fmt), scales.T)
