"""Read a model's parameters by name, a few rows at a time.

A checkpoint is read here, a bundle in ``reference/bundle_weights.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.prequantized_weights import PrequantizedReader
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter, Source
from fusion_edge.quant.formats import InputQuantization, WeightFormat
from fusion_edge.quant.packing import Packed
from fusion_edge.runtime.errors import FusionError


class Weights(Protocol):
    """Source of a model's parameters."""

    parameters: Mapping[str, Parameter]
    """Parameters by name."""

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` (exclusive), float32 ``[stop-start, ...]``. Thread-safe."""
        ...

    def activation_quantization(self, linear: str) -> InputQuantization | None:
        """Return how the inputs of ``linear`` are quantized, or None if they are float."""
        ...


def read_parameter(weights: Weights, name: str) -> npt.NDArray[np.float32]:
    """Return a whole parameter, float32."""
    return weights.rows(name, 0, weights.parameters[name].shape[0])


class CheckpointWeights:
    """Parameters read from the tensors of a checkpoint. Prequantized ones are dequantized."""

    def __init__(self, checkpoint: Checkpoint, parameters: Mapping[str, Parameter]) -> None:
        self.checkpoint = checkpoint
        self.parameters = parameters
        self._prequantized = PrequantizedReader(checkpoint)

    def activation_quantization(self, linear: str) -> InputQuantization | None:
        """Return None: a checkpoint's inputs are float."""
        return None

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows as :meth:`Weights.rows`. Raises :class:`FusionError` for values that are not finite."""
        parts = [
            self._float_rows(source, low, high)
            if source.prequantized is None
            else self._prequantized.values(source, low, high)
            for source, low, high in self._sources(name, start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def prequantized_rows(self, name: str, start: int, stop: int, fmt: WeightFormat) -> Packed:
        """Return rows of a prequantized parameter with the checkpoint's own integers, in the plan's format.

        Raises :class:`FusionError` for scales that are not finite.
        """
        return self._prequantized.packed(self._sources(name, start, stop), fmt)

    def _sources(self, name: str, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        """Yield the sources of some rows of a parameter, each with its first and last row (exclusive)."""
        first = 0
        for source in self.parameters[name].sources:
            low, high = max(start - first, 0), min(stop - first, source.rows)
            if low < high:
                yield source, low, high
            first += source.rows

    def _float_rows(self, source: Source, low: int, high: int) -> npt.NDArray[np.float32]:
        part = self.checkpoint.read_rows(source.tensor, source.first_row + low, source.first_row + high)
        part = part.reshape(high - low, *([-1] if part.ndim > 1 else []))
        part = part if source.column_range is None else part[:, slice(*source.column_range)]
        # The sum is finite only if every element is, and is faster than isfinite().all().
        if not np.isfinite(part.sum(dtype=np.float64)):
            raise FusionError(
                f"Tensor {source.tensor} of {self.checkpoint.folder} holds NaN or infinite values: the checkpoint is "
                "damaged. Download or save it again."
            )
        return part
