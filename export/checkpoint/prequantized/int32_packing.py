"""Pack integers of 4 or 8 bits into int32 words, the first in the lowest bits, as GPTQ and compressed-tensors do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def int32_count(count: int, bits: int) -> int:
    """Return the number of int32 words for ``count`` integers."""
    return -(-count * bits // 32)


def pack_int32(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Pack ``[n,m]`` into int32 ``[n, int32_count(m)]``. Unused bits of the last word are 0."""
    count = values.shape[1]
    padded = np.pad(values, ((0, 0), (0, int32_count(count, bits) * 32 // bits - count)))
    pairs = padded[:, ::2] | np.left_shift(padded[:, 1::2], np.uint8(4)) if bits == 4 else padded
    words: npt.NDArray[np.int32] = np.ascontiguousarray(pairs).view("<i4")
    return words


def unpack_int32(words: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Invert :func:`pack_int32`. Return uint8 ``[n,count]``."""
    stored: npt.NDArray[np.uint8] = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return stored[:, :count]
    values = np.empty((len(stored), 2 * stored.shape[1]), np.uint8)
    np.bitwise_and(stored, 15, out=values[:, ::2])
    np.right_shift(stored, 4, out=values[:, 1::2])
    return values[:, :count]
