"""References of linear layers in integer arithmetic: float64, apart from the quantization of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def quantized(x: Array, block_size: int) -> Array:
    """Return rows after dynamic quantization to int8, one scale per row and block, as at accuracy level 4."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block_size))).reshape(len(x), -1, block_size)
    largest = np.abs(padded).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    values = np.rint(padded * inverse).astype(np.float64) * (largest / np.float32(127))
    result: Array = values.reshape(len(x), -1)[:, : x.shape[1]]
    return result


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
