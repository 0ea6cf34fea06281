"""Floating-point numbers that numpy lacks: bfloat16, and a fused multiply-add that rounds once."""

from __future__ import annotations

import numpy as np

from fusion_edge.kernels.ptx.threads import Values


def bfloat16_to_float32(bits: Values) -> Values:
    """Return the numbers of which ``bits`` are the bfloat16, exactly."""
    upper: Values = bits.astype(np.uint32) << np.uint32(16)
    return upper.view(np.float32)


def float32_to_bfloat16(values: Values) -> Values:
    """Return the bits of bfloat16, rounded to nearest even."""
    bits = values.view(np.uint32)
    upper = bits >> np.uint32(16)
    nearest = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    rounded: Values = np.where(np.isnan(values), upper | np.uint32(0x40), nearest)
    return rounded.astype(np.uint16)


def fused_multiply_add(a: Values, b: Values, c: Values) -> Values:
    """Return ``a * b + c`` of float32 in float64, rounded to odd: rounding that is as rounding the exact result.

    The product is exact in float64. After Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product
    return _to_odd(total, (product - (total - back)) + (addend - back))


def float64_to_bfloat16(values: Values) -> Values:
    """Return the bits of bfloat16 of numbers that are exact, or rounded to odd."""
    nearest = values.astype(np.float32)
    return float32_to_bfloat16(_to_odd(nearest, values - nearest))


def _to_odd(nearest: Values, error: Values) -> Values:
    """Return the neighbor with an odd last bit where ``nearest`` lacks an ``error``; else ``nearest``."""
    bits = nearest.view(np.dtype(f"int{8 * nearest.itemsize}"))
    step = np.where((error > 0) != np.signbit(nearest), 1, -1).astype(bits.dtype)
    even = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    return np.where(even, bits + step, bits).view(nearest.dtype)
