"""Sources of a bundle's weights: a checkpoint rounded to nearest, or a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.weights import CheckpointWeights
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.quant.formats import InputQuantization
from fusion_edge.quant.packing import Packed, check_range, dequantize, quantize
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Packed rows of a linear, and their rounding error."""

    packed: Packed
    squared_error: float = 0.0
    """Sum of squares of the rounding errors; 0 for rows that were quantized before."""
    squared_norm: float = 0.0
    """Sum of squares of the float rows; 0 for rows that were quantized before."""


class WeightSource(Protocol):
    """Source of a bundle's weights. All methods are thread-safe."""

    @property
    def report(self) -> QuantizationReport:
        """Report of the linears that were quantized before the bundle is written."""
        ...

    def float_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows of a parameter that the bundle stores as floats, ``[stop-start, ...]``."""
        ...

    def packed_rows(self, linear: Linear, start: int, stop: int) -> PackedRows:
        """Return rows of a linear in its quantized format.

        Raises :class:`FusionError` for values that are not finite or exceed the range of the format.
        """
        ...

    def activation_quantization(self, linear: Linear) -> InputQuantization:
        """Return how a ``w8a8`` or ``nvfp4`` linear quantizes its activations."""
        ...

    def tensor_scale(self, linear: Linear) -> float:
        """Return the scale of a whole ``nvfp4`` weight."""
        ...


class RoundToNearest:
    """Weights of a checkpoint: prequantized linears keep their integers, all others are rounded to nearest."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self._weights = weights

    @property
    def report(self) -> QuantizationReport:
        """An empty report."""
        return QuantizationReport((), 0, None)

    def float_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows of the checkpoint's parameter."""
        return self._weights.rows(name, start, stop)

    def packed_rows(self, linear: Linear, start: int, stop: int) -> PackedRows:
        """Return the checkpoint's integers, or rows rounded to nearest."""
        name, fmt = linear.weight.name, linear.format
        if linear.prequantized:
            return PackedRows(self._weights.prequantized_rows(name, start, stop, fmt))
        rows = self._weights.rows(name, start, stop)
        check_range(name, rows, fmt)
        packed = quantize(rows, fmt)
        return PackedRows(packed, _squares(rows - dequantize(packed, fmt, linear.inputs)), _squares(rows))

    def activation_quantization(self, linear: Linear) -> InputQuantization:
        """Raise ``AssertionError``: planning refuses quantized activations without a calibration."""
        raise AssertionError(f"{linear.name} is {linear.format} in a plan without calibration")

    def tensor_scale(self, linear: Linear) -> float:
        """Raise ``AssertionError``: ``nvfp4`` quantizes activations."""
        raise AssertionError(f"{linear.name} is {linear.format} in a plan without calibration")


def _squares(rows: npt.NDArray[np.float32]) -> float:
    """Return the sum of squares. The summation order of a dot product would depend on the processor."""
    return float(np.square(rows).sum())  # pairwise summation: float32 is accurate enough
