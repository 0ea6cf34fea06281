"""FP4 in the format E2M1: one sign bit, two exponent bits with bias 1, one mantissa bit.

ONNX calls it FLOAT4E2M1. Bit 3 of a code is the sign.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
"""Value of each code, float32 ``[16]``."""
LARGEST = 6.0


def encode(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Round to nearest, ties to even; values beyond :data:`LARGEST` become it. Returns one code a byte."""
    magnitudes = np.abs(values)
    codes: npt.NDArray[np.uint8] = np.signbit(values).astype(np.uint8) << np.uint8(3)
    for code, midpoint in enumerate((_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2):
        # A midpoint rounds up from an odd code, down from an even one.
        codes += magnitudes >= midpoint if code % 2 else magnitudes > midpoint
    return codes
