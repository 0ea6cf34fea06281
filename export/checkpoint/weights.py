"""Parameters of a model by name, read a few rows at a time.

Two sources exist: a released checkpoint, here, and an exported bundle, dequantized (``reference/bundle_weights.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.prequantized_weights import PrequantizedReader
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter, Source
from fusion_edge.quant.formats import ActivationQuantization, WeightFormat
from fusion_edge.quant.packing import Packed
from fusion_edge.runtime.errors import FusionError


class Weights(Protocol):
    """Where parameters come from."""

    parameters: Mapping[str, Parameter]

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start`` to ``stop`` of a parameter, float32 ``[stop-start, ...]``. Safe in several threads."""
        ...

    def activation_quantization(self, linear: str) -> ActivationQuantization | None:
        """How the inputs of a linear (its name without ``.weight``) are rounded, None if they are not."""
        ...


def read_parameter(weights: Weights, name: str) -> npt.NDArray[np.float32]:
    """A whole parameter, float32."""
    return weights.rows(name, 0, weights.parameters[name].shape[0])


class CheckpointWeights:
    """Parameters assembled from the tensors of a checkpoint, dequantized where they are quantized."""

    def __init__(self, checkpoint: Checkpoint, parameters: Mapping[str, Parameter]) -> None:
        self.checkpoint = checkpoint
        self.parameters = parameters
        self._prequantized = PrequantizedReader(checkpoint)

    def activation_quantization(self, linear: str) -> ActivationQuantization | None:
        """None: a checkpoint's inputs are float."""
        return None

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """See :meth:`Weights.rows`. Raises :class:`FusionError` for values that are not finite."""
        parts = [
            self._float_rows(source, low, high)
            if source.prequantized is None
            else self._prequantized.values(source, low, high)
            for source, low, high in self._sources(name, start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def prequantized_rows(self, name: str, start: int, stop: int, form: WeightFormat) -> Packed:
        """Rows of a prequantized parameter with the checkpoint's own integers, in the format of the plan.

        Raises :class:`FusionError` for scales that are not finite.
        """
        return self._prequantized.packed(self._sources(name, start, stop), form)

    def _sources(self, name: str, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        """The sources of some rows of a parameter, with the range of the rows that each gives to it."""
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
        # A sum is finite only if every element is, and costs a fraction of isfinite().all().
        if not np.isfinite(part.sum(dtype=np.float64)):
            raise FusionError(
                f"Tensor {source.tensor} of {self.checkpoint.folder} holds NaN or infinite values; "
                "the checkpoint is damaged: fetch or save it again."
            )
        return part
