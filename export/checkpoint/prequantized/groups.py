"""Convert a checkpoint's quantization groups to those that bundles store."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.quant.formats import STORED_GROUP_SIZES
from fusion_edge.runtime.errors import FusionError


def stored_group_size(tensor: str, group: int, inputs: int) -> int:
    """Return the group size in which a bundle stores groups of ``group`` out of ``inputs`` columns.

    Where it is smaller, scales are repeated: the weights stay the same bit for bit. A group of a whole row is not
    divided. Raises as :func:`power_of_two_in`.
    """
    if group < inputs:
        return power_of_two_in(tensor, group)
    return min(max(1 << (inputs - 1).bit_length(), STORED_GROUP_SIZES[0]), STORED_GROUP_SIZES[-1])


def power_of_two_in(tensor: str, group: int) -> int:
    """Return the largest power of two that divides ``group``, at most the largest stored group size.

    Raises :class:`FusionError` if it is below the smallest stored group size.
    """
    size = min(group & -group, STORED_GROUP_SIZES[-1])
    if size < STORED_GROUP_SIZES[0]:
        raise FusionError(
            f"The quantized tensor {tensor} has groups of {group} columns; expected a multiple of "
            f"{STORED_GROUP_SIZES[0]}. Quantize the checkpoint with groups of 32, 64 or 128, or export the float "
            "checkpoint."
        )
    return size


def column_order(tensor: str, groups: npt.NDArray[np.int32], group: int) -> tuple[int, ...] | None:
    """Return the order of columns that makes each group contiguous, by each column's group. None if they are.

    Raises :class:`FusionError` unless every group but the last has ``group`` columns.
    """
    in_place = np.arange(len(groups)) // group
    if np.array_equal(groups, in_place):
        return None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], in_place):
        raise FusionError(
            f"{tensor} does not assign {group} columns to each of the groups 0 to {in_place[-1]}: the checkpoint is "
            "damaged. Download or quantize it again."
        )
    return tuple(order.tolist())
