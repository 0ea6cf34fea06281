"""NF4 and FP4 as bitsandbytes rounds to them: 4-bit integers that stand for 16 unevenly spaced numbers.

NF4 (Dettmers et al. 2023, arXiv:2305.14314): quantiles of a normal distribution. FP4: a sign, two bits of exponent, one
of mantissa. Both from -1 to 1, times the largest absolute value of a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CODES = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}
"""float32 ``[16]`` by kind: what each integer stands for, bit for bit bitsandbytes' tables and MatMulBnb4's."""

SMALLEST = np.float32(1e-38)  # bitsandbytes divides by no less


def quantize(
    rows: npt.NDArray[np.float32], kind: str, block: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Round ``[n,K]``, K a multiple of ``block``: integers ``[n,K]``, largest absolute values ``[n,K/block]``.

    As bitsandbytes does on a CPU: to the nearest number, of two equally near ones to the lower.
    """
    codes = CODES[kind]
    order = np.argsort(codes, kind="stable")
    midpoints = (codes[order[:-1]] + codes[order[1:]]) / np.float32(2)
    blocks = rows.reshape(len(rows), -1, block)
    absmax = np.abs(blocks).max(axis=2)
    scaled = np.clip(blocks * (1 / np.maximum(absmax, SMALLEST))[:, :, None], -1, 1)
    rank = np.zeros(scaled.shape, np.uint8)
    for midpoint in midpoints:  # twenty times as fast as a search
        rank += scaled > midpoint
    return order.astype(np.uint8)[rank].reshape(rows.shape), absmax
