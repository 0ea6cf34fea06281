"""What products in integers compute, in float64 but for the rounding of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rounded(x: Array, block_size: int) -> Array:
    """Rows as products at accuracy level 4 take them: int8, one scale a block."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block_size))).reshape(len(x), -1, block_size)
    largest = np.abs(padded).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    values = np.rint(padded * inverse).astype(np.float64) * (largest / np.float32(127))
    result: Array = values.reshape(len(x), -1)[:, : x.shape[1]]
    return result


def integer_tensors(generator: np.random.Generator, inputs: int, outputs: int, scale: float, zero_point: int) -> Any:
    return {
        "values": generator.integers(-127, 128, (outputs, inputs), np.int8),
        "scales": generator.uniform(1e-3, 1e-2, outputs).astype(np.float16),
        "x_scale": np.float32(scale),
        "x_zero_point": np.uint8(zero_point),
        "bias": generator.normal(size=outputs).astype(np.float32),
    }


def integer_product(tensors: Mapping[str, Array], x: Array) -> tuple[Array, float]:
    """In float64 but for the rounding of x, and the most that a result could be."""
    scale, zero_point = np.float32(tensors["x_scale"]), float(tensors["x_zero_point"])
    with np.errstate(over="ignore"):
        quotients = x.astype(np.float32) / scale
    steps = np.clip(np.rint(quotients).astype(np.float64) + zero_point, 0, 255) - zero_point
    weight = tensors["values"].astype(np.float64) * tensors["scales"].astype(np.float64)[:, None]
    most = 256 * scale * np.abs(weight).sum(1).max() + np.abs(tensors["bias"]).max()
    return steps * np.float64(scale) @ weight.T + tensors["bias"], float(most)


def one_step(tensors: Mapping[str, Array]) -> float:
    """What a result may be off if an input is rounded to the integer beside."""
    weight = tensors["values"].astype(np.float64) * tensors["scales"].astype(np.float64)[:, None]
    return 1.01 * float(np.abs(weight).max() * tensors["x_scale"])
