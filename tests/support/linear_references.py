"""References of linear layers in integer arithmetic: float64, apart from the quantization of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import Packed, dequantize

Array = npt.NDArray[Any]
SUPERBLOCK = 256
"""Inputs of 4-bit weights that share a scale in AMX tiles, unless a group has more."""
RATIO_ONE = 1 << 11
FEW_ROWS = 4
"""Rows up to which a layer is a GEMV, with the groups of the weights on every tier."""


def quantized(x: Array, block_size: int) -> Array:
    """Return rows after dynamic quantization to int8, one scale per row and block, as at accuracy level 4."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block_size))).reshape(len(x), -1, block_size)
    largest = np.abs(padded).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    values = np.rint(padded * inverse).astype(np.float64) * (largest / np.float32(127))
    result: Array = values.reshape(len(x), -1)[:, : x.shape[1]]
    return result


def linear(x: Array, packed: Packed, fmt: WeightFormat, tier: str) -> tuple[Array, Array]:
    """Return the activations and weights that a tier multiplies, after quantization."""
    inputs, block = x.shape[1], scale_block(fmt, len(x), tier)
    is_exact = block == fmt.block_size
    weight = dequantize(packed, fmt, inputs).astype(np.float64) if is_exact else requantized(packed, fmt, inputs)
    return quantized(x, block), weight


def scale_block(fmt: WeightFormat, rows: int, tier: str) -> int:
    """Return the number of inputs that share a scale of the activations."""
    return fmt.block_size if tier != "AMX" or rows <= FEW_ROWS or fmt.bits == 8 else max(SUPERBLOCK, fmt.block_size)


def requantized(packed: Packed, fmt: WeightFormat, inputs: int) -> Array:
    """Return 4-bit weights as AMX tiles hold them: int8, with a scale per output and superblock."""
    outputs, groups = packed.scales.shape
    codes, zeros = nibbles(packed.values).reshape(outputs, groups, -1), np.full((outputs, groups), 8)
    if packed.zero_points is not None:
        zeros = nibbles(packed.zero_points)[:, :groups]
    scales, steps = packed.scales.astype(np.float32), codes - zeros[:, :, None]
    shared = superblock_scales(scales, zeros, fmt)
    if fmt.block_size < SUPERBLOCK:
        ratios = np.rint(scales / shared * RATIO_ONE).astype(int)
        steps = (steps * 16 * ratios[:, :, None] + (1 << 14)) >> 15  # half up
    assert np.abs(steps).max() <= 127
    result: Array = (steps * shared.astype(np.float64)[:, :, None]).reshape(outputs, -1)[:, :inputs]
    return result


def superblock_scales(scales: Array, zeros: Array, fmt: WeightFormat) -> Array:
    """Return each group's scale in AMX tiles: the smallest one with which its superblock fits int8."""
    if fmt.block_size >= SUPERBLOCK:
        return scales
    levels = (127 // np.maximum(zeros, 15 - zeros)).astype(np.float32)
    least, count = np.abs(scales) * (1 / levels), SUPERBLOCK // fmt.block_size
    padded = np.pad(least, ((0, 0), (0, -least.shape[1] % count)))
    shared = padded.reshape(len(scales), -1, count).max(-1)
    return np.repeat(shared, count, 1)[:, : scales.shape[1]]


def nibbles(values: Array) -> Array:
    """Return both halves of the bytes of each row, the low one first."""
    flat = values.reshape(len(values), -1)
    return np.stack([flat & 15, flat >> 4], -1).reshape(len(values), -1).astype(int)


def integer_tensors(generator: np.random.Generator, inputs: int, outputs: int, scale: float, zero_point: int) -> Any:
    """Return random ``INTEGER_LINEAR_INPUTS`` for activations of the given scale and zero point."""
    return {
        "values": generator.integers(-127, 128, (outputs, inputs), np.int8),
        "scales": generator.uniform(1e-3, 1e-2, outputs).astype(np.float16),
        "x_scale": np.float32(scale),
        "x_zero_point": np.uint8(zero_point),
        "bias": generator.normal(size=outputs).astype(np.float32),
    }


def integer_linear(tensors: Mapping[str, Array], x: Array) -> tuple[Array, float]:
    """Return the output of an 8-bit linear layer, and the largest magnitude that an output may have."""
    scale, zero_point = np.float32(tensors["x_scale"]), float(tensors["x_zero_point"])
    with np.errstate(over="ignore"):
        quotients = x.astype(np.float32) / scale
    steps = np.clip(np.rint(quotients).astype(np.float64) + zero_point, 0, 255) - zero_point
    weight = tensors["values"].astype(np.float64) * tensors["scales"].astype(np.float64)[:, None]
    most = 256 * scale * np.abs(weight).sum(1).max() + np.abs(tensors["bias"]).max()
    return steps * np.float64(scale) @ weight.T + tensors["bias"], float(most)


def one_step(tensors: Mapping[str, Array]) -> float:
    """Return the error of an output if one activation is rounded to the next integer."""
    weight = tensors["values"].astype(np.float64) * tensors["scales"].astype(np.float64)[:, None]
    return 1.01 * float(np.abs(weight).max() * tensors["x_scale"])
