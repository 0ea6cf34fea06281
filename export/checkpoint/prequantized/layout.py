"""Interface of the layouts of prequantized checkpoints.

A layout stores a linear's weight ``[N,K]`` as several tensors. It names them, gives the :class:`StoredLayout` in which
a bundle keeps the weight, and reads rows as :class:`QuantizedRows`: the checkpoint's own integers, scales and zero
points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.safetensors_header import FLOAT_DTYPES
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.quant.formats import WeightFormat


@dataclass(frozen=True)
class ExpectedTensor:
    """Shape and allowed types of a tensor that the checkpoint must have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOAT_DTYPES


@dataclass(frozen=True)
class StoredLayout:
    """How a bundle stores a prequantized weight."""

    format: WeightFormat
    scale_dtype: str
    """``float16`` if the checkpoint's scales are, else ``float32``: both are lossless."""
    columns: tuple[int, ...] | None
    """Column of the weight in each stored column. None: the order is unchanged."""


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows of a weight, columns in the order of :attr:`StoredLayout.columns`, groups of :attr:`StoredLayout.format`."""

    values: npt.NDArray[np.uint8]
    """Integers ``[n,K]``."""
    scales: npt.NDArray[np.floating]
    """``[n, groups]``."""
    zero_points: npt.NDArray[np.uint8] | None
    """``[n, groups]``. None with a codebook."""


@dataclass(frozen=True, eq=False)
class WeightScales:
    """All scales of a weight."""

    tensor: str
    """Name of the tensor that holds them."""
    values: npt.NDArray[np.floating]
    may_be_zero: bool = False
    """Whether a group of zeros may have the scale 0."""


RowReader = Callable[[int, int], QuantizedRows]
"""Return rows from a first to a last (exclusive). Thread-safe."""


class PrequantizedTensor(Protocol):
    """A weight of a prequantized checkpoint. Its tensors' presence and shapes are checked before it is read."""

    @property
    def tensors(self) -> Mapping[str, ExpectedTensor]:
        """Tensors that store the weight, by name."""
        ...

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        """Return the layout in a bundle. Reads small tensors only.

        Raises :class:`FusionError` for values that the checkpoint's layout forbids.
        """
        ...

    def scales(self, checkpoint: Checkpoint) -> WeightScales:
        """Read the scales."""
        ...

    def open(self, checkpoint: Checkpoint) -> RowReader:
        """Read the whole weight, still packed, and return a reader of its rows."""
        ...


class CheckpointLayout(Protocol):
    """How a checkpoint stores quantized weights, as its ``quantization_config`` says."""

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """Return the weight ``tensor`` of ``shape`` ``[N,K]``, or None if it is not quantized."""
        ...
