"""FP8 in the format E4M3: one sign bit, four exponent bits with bias 7, three mantissa bits, no infinities.

ONNX calls it FLOAT8E4M3FN. The largest value is 448. Values below 2^-6 are subnormal, multiples of 2^-9.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LARGEST = np.float32(448)
SMALLEST_NORMAL = np.float32(2.0**-6)
STEPS_OF_SUBNORMALS = np.float32(2.0**9)
DROPPED_BITS = np.uint32(20)
"""Bits of a float32's mantissa that E4M3 has not."""
LEAST_EXPONENT = np.uint32((127 - 7) << 3)
"""Code of float32's exponents from which E4M3's start, with three bits of mantissa."""


def encode(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Round to nearest, ties to even; values beyond :data:`LARGEST` become it."""
    magnitudes = np.minimum(np.abs(values), LARGEST)
    bits = magnitudes.view(np.uint32)
    is_odd = (bits >> DROPPED_BITS) & np.uint32(1)
    half = np.uint32((1 << 19) - 1)
    normal = ((bits + half + is_odd) >> DROPPED_BITS) - LEAST_EXPONENT
    subnormal = np.rint(magnitudes * STEPS_OF_SUBNORMALS)
    codes = np.where(magnitudes < SMALLEST_NORMAL, subnormal.astype(np.uint8), normal.astype(np.uint8))
    signed: npt.NDArray[np.uint8] = codes | (np.signbit(values).astype(np.uint8) << np.uint8(7))
    return signed


def _value(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 128 else size


VALUES = np.array([_value(code) for code in range(256)], np.float32)
"""Value of each code. The codes 127 and 255 mean NaN; they are not written, and stand for 480 here."""
