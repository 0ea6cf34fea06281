"""Which weights get 8 bits where 4 are too few and a budget has room for some: those that buy most for their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.bundle.quantization_report import Sensitivity


@dataclass(frozen=True)
class Candidate:
    """A linear with 4 bits that may get 8."""

    sensitivity: Sensitivity
    extra_bytes: int
    """What 8 bits add to the bundle, at the most."""


def choose(candidates: Sequence[Candidate], spare_bytes: int) -> list[str]:
    """Names of the linears that get 8 bits, together within ``spare_bytes``.

    Greedy by KL divergence per byte, which of all divisible goods is the best choice there is; those that do not move
    the logits follow by the error of their outputs.
    """

    def worth(candidate: Candidate) -> tuple[float, float]:
        sensitivity = candidate.sensitivity
        return -sensitivity.kl_divergence / candidate.extra_bytes, sensitivity.output_sqnr

    chosen = []
    for candidate in sorted(candidates, key=worth):
        if candidate.extra_bytes <= spare_bytes:
            spare_bytes -= candidate.extra_bytes
            chosen.append(candidate.sensitivity.name)
    return chosen


def stored_bits(shape: tuple[int, int], form: WeightFormat) -> int:
    """Bits of the values, scales and zero points of a linear ``[outputs, inputs]``."""
    rows, inputs = shape
    overhead = 8 * np.dtype(form.scale_dtype).itemsize + (0 if form.is_symmetric else form.bits)
    return rows * form.blocks(inputs) * (form.block(inputs) * form.bits + overhead)


def mean_bits(shapes: Mapping[str, tuple[int, int]], formats: Mapping[str, WeightFormat]) -> float:
    """Bits that a weight takes in the mean over the linears of ``shapes``, scales and zero points included."""
    stored = sum(stored_bits(shape, formats[name]) for name, shape in shapes.items())
    return stored / sum(rows * inputs for rows, inputs in shapes.values())
