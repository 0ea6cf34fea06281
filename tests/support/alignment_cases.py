"""Random inputs of the recursive alignment's operators, with the result in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusion_edge.kernels.onnx_functions import alignment
from fusion_edge.kernels.triton.ahead_of_time import CONTEXT_ROWS
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, ALIGNMENT_NORM_EPS

Array = npt.NDArray[Any]
Numbers = npt.NDArray[np.float64]
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LENGTH = 40
"""Rows of the sequence."""


@dataclass(frozen=True)
class Case:
    """Inputs and result of one operator. bfloat16 arrays are their bits."""

    operator: str
    dtype: str
    inputs: tuple[Array, ...]
    output: Array
    """Memory of the result; that of the first input, if the operator works in place."""
    expected: Numbers

    def error(self) -> Numbers:
        """Return how far each element of the output is from the result; NaN where nothing wrote."""
        bits = torch.from_numpy(self.output)
        values = bits.view(TYPES[self.dtype]).double().numpy()
        difference: Numbers = np.abs(values - self.expected)
        return difference

    def is_right(self) -> bool:
        """Whether each element is the result, rounded to the type after float32 arithmetic.

        Of float32, an element goes through fewer than 64 operations in a row on values of about 1: 32 columns and
        seven shuffles of a sum, twice, and a dozen more.
        """
        unit = torch.finfo(TYPES[self.dtype]).eps / 2
        magnitude = np.abs(self.expected)
        return bool((self.error() <= unit * magnitude + 64 * 2**-24 * np.maximum(magnitude, 1)).all())


def case(operator: str, dtype: str, questions: int, latents: int, width: int, scale: float = 1) -> Case:
    """Return normally distributed inputs for ``latents`` of each question, all times ``scale``."""
    rng = np.random.default_rng(questions + latents + width)

    def values(*shape: int) -> tuple[Array, Numbers]:
        rounded = torch.from_numpy(scale * rng.standard_normal(shape)).to(TYPES[dtype])
        bits = rounded.view(torch.uint16) if dtype == "bf16" else rounded
        return bits.numpy(), rounded.double().numpy()

    rows = questions, latents, width
    if operator == alignment.CONTEXT_ATTENTION:
        q, k, v = values(*rows), *(values(1, latents, CONTEXT_ROWS, width) for _ in range(2))
        expected = alignment.context_attention_reference(q[1], k[1], v[1], ALIGNMENT_HEADS)
        return Case(operator, dtype, (q[0], k[0], v[0]), _unwritten(q[0]), expected)
    if operator == alignment.ADD_LAYER_NORM:
        x, residual, weight, bias = values(*rows), values(*rows), values(width), values(width)
        expected = alignment.add_layer_norm_reference(x[1], residual[1], weight[1], bias[1], ALIGNMENT_NORM_EPS)
        return Case(operator, dtype, (x[0], residual[0], weight[0], bias[0]), _unwritten(x[0]), expected)
    x, old, update = values(1, LENGTH, width), values(*rows), values(*rows)
    positions = rng.permutation(LENGTH)[: questions * latents].reshape(questions, latents)
    expected = alignment.add_rows_reference(x[1], positions, old[1], update[1])
    return Case(operator, dtype, (x[0], positions, old[0], update[0]), x[0], expected)


def _unwritten(array: Array) -> Array:
    """Return NaN in the shape of an array, also as bits of bfloat16."""
    return np.full_like(array, np.nan if array.dtype.kind == "f" else 0x7FC0)
