"""Conversion of pixel values to 8 bits: one rule for files, Pillow images and arrays."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

ACCEPTED_VALUES = "8 bits (uint8), 16 bits (uint16, 0 to 65535), floats from 0 to 1, or booleans"

_BLOCK_VALUES = 1 << 20  # per block, which bounds the memory


def eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale ``values`` of any shape to uint8 by the range of their dtype.

    Booleans become 0 and 255; 65535 of uint16 and 1.0 of floats become 255, rounded to nearest; uint8 stays. Raises
    ``ValueError``, a part of a sentence, for other dtypes, whose range is not known, and for floats outside 0 to 1.
    """
    if values.dtype == np.uint8:
        return cast("npt.NDArray[np.uint8]", values)
    if values.dtype == np.bool_:
        return (values.astype(np.uint8) * 255).astype(np.uint8)
    floats = np.issubdtype(values.dtype, np.floating)
    if not floats and (values.dtype.kind, values.dtype.itemsize) != ("u", 2):
        raise ValueError(f"holds {values.dtype}, whose range is not known; expected {ACCEPTED_VALUES}.")
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _BLOCK_VALUES // max(1, values[:1].size))
    for top in range(0, len(values), rows):
        block = values[top : top + rows]
        if floats:
            scaled[top : top + rows] = _from_floats(block)
        else:  # 65535 / 255 = 257, so white stays white
            scaled[top : top + rows] = (block.astype(np.uint32) + 128) // 257
    return scaled


def _from_floats(block: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    outside = ~((block >= 0) & (block <= 1))  # also true for NaN
    if outside.any():
        raise ValueError(f"holds the value {float(block[outside][0]):g}; expected floats from 0 to 1, or uint8.")
    return np.rint(block.astype(np.float64) * 255)
