"""Weights of integers with a scale and a zero point per group: the common part of GPTQ and compressed-tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.prequantized.groups import column_order, stored_group_size
from fusion_edge.export.checkpoint.prequantized.layout import QuantizedRows, RowReader, StoredLayout, WeightScales
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import by_block

Unpack = Callable[[int, int], npt.NDArray[np.uint8]]
"""Return integers ``[n,K]`` of rows from a first to a last (exclusive)."""


@dataclass(frozen=True)
class GroupedIntegers(ABC):
    """A weight ``[rows, inputs]``; see :class:`~fusion_edge.export.checkpoint.prequantized.layout.PrequantizedTensor`.

    A subclass names the tensors and reads them.
    """

    name: str
    """Tensor in messages about the weight."""
    rows: int
    inputs: int
    bits: int
    group: int
    """Columns per group, in the checkpoint."""
    scale_tensor: str
    group_index: str | None
    """Tensor with each column's group. None: groups are contiguous."""

    @abstractmethod
    def read_scales(self, checkpoint: Checkpoint) -> npt.NDArray[np.floating]:
        """Return the scales ``[N, groups]``."""

    @abstractmethod
    def read_zero_points(self, checkpoint: Checkpoint) -> npt.NDArray[np.uint8] | None:
        """Return the zero points ``[N, groups]``. None: the weight is symmetric."""

    @abstractmethod
    def read_values(self, checkpoint: Checkpoint) -> Unpack:
        """Read the packed integers and return a function that unpacks some rows."""

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        """See :meth:`PrequantizedTensor.stored_layout`."""
        sign = "" if self.read_zero_points(checkpoint) is None else "u"
        dtype = "float16" if checkpoint.tensors[self.scale_tensor].dtype == "F16" else "float32"
        size = stored_group_size(self.name, self.group, self.inputs)
        return StoredLayout(WeightFormat(f"{sign}int{self.bits}", size), dtype, self.read_columns(checkpoint))

    def scales(self, checkpoint: Checkpoint) -> WeightScales:
        """See :meth:`PrequantizedTensor.scales`."""
        return WeightScales(self.scale_tensor, self.read_scales(checkpoint))

    def open(self, checkpoint: Checkpoint) -> RowReader:
        """See :meth:`PrequantizedTensor.open`."""
        unpack, columns = self.read_values(checkpoint), self.read_columns(checkpoint)
        scales, zeros = self.read_scales(checkpoint), self.read_zero_points(checkpoint)
        if zeros is None:
            zeros = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        size = stored_group_size(self.name, self.group, self.inputs)
        scales = by_block(scales, self.group, self.inputs, size)
        zeros = by_block(zeros, self.group, self.inputs, size)
        order = None if columns is None else np.array(columns)

        def read(start: int, stop: int) -> QuantizedRows:
            values = unpack(start, stop)
            return QuantizedRows(values if order is None else values[:, order], scales[start:stop], zeros[start:stop])

        return read

    def read_columns(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        """Return :attr:`StoredLayout.columns`."""
        if self.group_index is None:
            return None
        return column_order(self.group_index, checkpoint.read_stored(self.group_index), self.group)
