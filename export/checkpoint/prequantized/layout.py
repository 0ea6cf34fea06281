"""What the layouts of quantized checkpoints have in common.

A layout stores a linear's weight ``[N,K]`` as several tensors. It names them, gives the :class:`StoredLayout` in which
a bundle keeps the weight, and reads rows as :class:`Codes`: the checkpoint's own integers, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.safetensors_header import FLOAT_DTYPES
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.quant.formats import STORED_GROUP_SIZES, WeightFormat
from fusion_edge.quant.packing import by_block
from fusion_edge.runtime.errors import FusionError


@dataclass(frozen=True)
class Expected:
    """A tensor that must be in the checkpoint."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOAT_DTYPES


@dataclass(frozen=True)
class StoredLayout:
    """How a bundle stores a weight that it takes over from a quantized checkpoint."""

    format: WeightFormat
    scale_dtype: str
    """``float16`` if the checkpoint's are, else ``float32``: nothing is lost."""
    columns: tuple[int, ...] | None
    """Which column of the weight each stored column is; None if all are in place."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows of a weight, columns in the order of :attr:`StoredLayout.columns`, groups of :attr:`StoredLayout.format`."""

    values: npt.NDArray[np.uint8]
    """``[n,K]``."""
    scales: npt.NDArray[np.floating]
    """``[n, groups]``."""
    zero_points: npt.NDArray[np.uint8] | None
    """``[n, groups]``; None with a codebook."""


@dataclass(frozen=True, eq=False)
class Scales:
    """All scales of a weight."""

    tensor: str
    """Name of the tensor that holds them."""
    values: npt.NDArray[np.floating]
    may_be_zero: bool = False
    """Whether the layout writes 0 for a group of zeros."""


Rows = Callable[[int, int], Codes]
"""Rows from a first to a last (exclusive); safe in several threads."""


class PrequantizedTensor(Protocol):
    """A quantized weight of a checkpoint. Its tensors are there with their shapes once they have been checked."""

    @property
    def tensors(self) -> Mapping[str, Expected]:
        """What stands for the weight, by name."""
        ...

    def stored_layout(self, checkpoint: Checkpoint) -> StoredLayout:
        """Reads small tensors alone. Raises :class:`FusionError` for values that the layout forbids."""
        ...

    def scales(self, checkpoint: Checkpoint) -> Scales:
        """Reads the scales alone."""
        ...

    def open(self, checkpoint: Checkpoint) -> Rows:
        """Reads the whole weight, packed as it is."""
        ...


def integer_rows(
    unpack: Callable[[int, int], npt.NDArray[np.uint8]],
    scales: npt.NDArray[np.floating],
    zeros: npt.NDArray[np.uint8],
    sizes: tuple[int, int, int],
    columns: tuple[int, ...] | None,
) -> Rows:
    """Rows of a layout of integers: ``unpack`` gives out some, ``scales`` and ``zeros`` are ``[N, groups]``.

    ``sizes`` are the checkpoint's group size, K, and the bundle's group size.
    """
    group, inputs, size = sizes
    scales, zeros = by_block(scales, group, inputs, size), by_block(zeros, group, inputs, size)
    order = None if columns is None else np.array(columns)

    def read(start: int, stop: int) -> Codes:
        values = unpack(start, stop)
        return Codes(values if order is None else values[:, order], scales[start:stop], zeros[start:stop])

    return read


def scale_dtype(checkpoint: Checkpoint, scales: str) -> str:
    """:attr:`StoredLayout.scale_dtype` for the tensor ``scales``."""
    return "float16" if checkpoint.tensors[scales].dtype == "F16" else "float32"


def stored_group_size(tensor: str, group: int, inputs: int) -> int:
    """The group size with which a bundle keeps groups of ``group`` out of ``inputs`` channels.

    Scales are repeated where it is smaller: the weights stay the same bit for bit. A group of the whole row need not be
    divided. Raises as :func:`power_of_two_in`.
    """
    if group < inputs:
        return power_of_two_in(tensor, group)
    return min(max(1 << (inputs - 1).bit_length(), STORED_GROUP_SIZES[0]), STORED_GROUP_SIZES[-1])


def power_of_two_in(tensor: str, group: int) -> int:
    """The largest power of two that divides ``group``, up to what bundles hold.

    Raises :class:`FusionError` if it is smaller than what they hold.
    """
    size = min(group & -group, STORED_GROUP_SIZES[-1])
    if size < STORED_GROUP_SIZES[0]:
        raise FusionError(
            f"The quantized tensor {tensor} has groups of {group} columns; expected groups that a power of two from "
            f"{STORED_GROUP_SIZES[0]} divides. Quantize the checkpoint with groups of 32, 64 or 128, or export the "
            "float checkpoint."
        )
    return size


def column_order(tensor: str, groups: npt.NDArray[np.int32], group: int) -> tuple[int, ...] | None:
    """The order that brings the columns of a group together, given each column's group; None if they are.

    Raises :class:`FusionError` unless every group but the last has ``group`` columns.
    """
    in_place = np.arange(len(groups)) // group
    if np.array_equal(groups, in_place):
        return None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], in_place):
        raise FusionError(
            f"{tensor} does not give {group} columns to each of the groups 0 to {in_place[-1]}; the checkpoint is "
            "damaged: fetch or quantize it again."
        )
    return tuple(order.tolist())
