"""Allocation of 8 bits to the most sensitive 4-bit linears, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.bundle.quantization_report import Sensitivity


@dataclass(frozen=True)
class Promotion:
    """A 4-bit linear that may be promoted to 8 bits."""

    sensitivity: Sensitivity
    extra_bytes: int
    """Upper bound of the bytes that 8 bits add to the bundle."""


def allocate(promotions: Sequence[Promotion], spare_bytes: int) -> list[str]:
    """Return the names of the linears to promote; together they cost at most ``spare_bytes``.

    Linears are promoted in order of KL divergence per extra byte (the greedy order of the knapsack problem). Linears
    without a measurable KL divergence follow, in order of the SQNR of their outputs.
    """

    def priority(promotion: Promotion) -> tuple[float, float]:
        sensitivity = promotion.sensitivity
        return -sensitivity.kl_divergence / promotion.extra_bytes, sensitivity.output_sqnr

    promoted = []
    for promotion in sorted(promotions, key=priority):
        if promotion.extra_bytes <= spare_bytes:
            spare_bytes -= promotion.extra_bytes
            promoted.append(promotion.sensitivity.name)
    return promoted


def stored_bits(shape: tuple[int, int], fmt: WeightFormat) -> int:
    """Return the bits of the values, scales and zero points of a linear ``[outputs, inputs]``."""
    rows, inputs = shape
    overhead = fmt.scale_bits + (0 if fmt.is_symmetric else fmt.bits)
    return rows * fmt.blocks(inputs) * (fmt.block(inputs) * fmt.bits + overhead)


def stored_bytes(shape: tuple[int, int], fmt: WeightFormat, target: str) -> int:
    """Return the bytes of a linear ``[outputs, inputs]`` in a bundle for ``target``, with scales and zero points."""
    rows, inputs = shape
    if not fmt.is_quantized:
        return rows * inputs * fmt.bits // 8
    if fmt.bits == 8 and target == "tensorrt":  # one scale a row: TensorRT has groups for 4 bits only
        return rows * (inputs + fmt.scale_bits // 8)
    unused = 0 if fmt.is_symmetric else -fmt.blocks(inputs) * fmt.bits % 8  # zero points of a row are whole bytes
    return (stored_bits(shape, fmt) + rows * unused) // 8


def mean_bits(shapes: Mapping[str, tuple[int, int]], formats: Mapping[str, WeightFormat]) -> float:
    """Return the mean bits per weight of the linears in ``shapes``, scales and zero points included."""
    stored = sum(stored_bits(shape, formats[name]) for name, shape in shapes.items())
    return stored / sum(rows * inputs for rows, inputs in shapes.values())
