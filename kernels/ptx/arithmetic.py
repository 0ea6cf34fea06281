"""Arithmetic of PTX: a table of the instructions that compute a register from registers, thread by thread.

Results are exact and rounded once, also where a GPU approximates: ``ex2.approx``, ``div.full`` and ``sqrt.approx`` err
there by about two units in the last place. The bits of a NaN are numpy's, not a GPU's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from fusion_edge.kernels.ptx.floats import (
    bfloat16_to_float32,
    float32_to_bfloat16,
    float64_to_bfloat16,
    fused_multiply_add,
)
from fusion_edge.kernels.ptx.threads import Values

STORAGE: dict[int, np.dtype[Any]] = {1: np.dtype(bool), **{bits: np.dtype(f"uint{bits}") for bits in (16, 32, 64)}}
"""How a register is kept, by its bits."""
_ELEMENTS = {
    "pred": np.dtype(bool),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
    **{f"{kind}{bits}": np.dtype(f"uint{bits}") for kind in "bu" for bits in (16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (16, 32, 64)},
}


@dataclass(frozen=True)
class Operation:
    """What an instruction computes: ``function`` maps arrays of types ``sources`` to one of type ``result``."""

    sources: tuple[str, ...]
    result: str
    function: Callable[..., Values]


def element(kind: str) -> np.dtype[Any]:
    """Return numpy's type for a type of PTX. bfloat16 is its bits, and a packed type (``f16x2``) its two elements."""
    return _ELEMENTS[kind.removesuffix("x2")]


def register_bits(kind: str) -> int:
    """Return the bits of a register of a type."""
    return 1 if kind == "pred" else 8 * element(kind).itemsize * (2 if kind.endswith("x2") else 1)


def _same(kind: str, count: int, function: Callable[..., Values]) -> Operation:
    return Operation((kind,) * count, kind, function)


def _integers() -> Iterator[tuple[str, Operation]]:
    for kind in ("s32", "u32", "s64", "u64"):
        yield f"add.{kind}", _same(kind, 2, np.add)
        yield f"sub.{kind}", _same(kind, 2, np.subtract)
        yield f"neg.{kind}", _same(kind, 1, np.negative)
        yield f"mul.lo.{kind}", _same(kind, 2, np.multiply)
        yield f"mad.lo.{kind}", _same(kind, 3, lambda a, b, c: a * b + c)
        yield f"rem.{kind}", _same(kind, 2, np.fmod)  # of the dividend's sign, as in C
        yield f"shr.{kind}", Operation((kind, "u32"), kind, _shift_right)
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            yield f"setp.{name}.{kind}", Operation((kind, kind), "pred", getattr(operator, name))
    for kind, wide in (("s32", "s64"), ("u32", "u64")):
        yield f"mul.wide.{kind}", Operation((kind, kind), wide, _wide_product)
        yield f"mad.wide.{kind}", Operation((kind, kind, wide), wide, lambda a, b, c: _wide_product(a, b) + c)


def _bits() -> Iterator[tuple[str, Operation]]:
    for kind in ("pred", "b16", "b32", "b64"):
        yield f"and.{kind}", _same(kind, 2, np.bitwise_and)
        yield f"or.{kind}", _same(kind, 2, np.bitwise_or)
        yield f"xor.{kind}", _same(kind, 2, np.bitwise_xor)
        yield f"not.{kind}", _same(kind, 1, np.invert)
    for kind in ("b16", "b32", "b64"):
        yield f"shl.{kind}", Operation((kind, "u32"), kind, _shift_left)
        yield f"setp.eq.{kind}", Operation((kind, kind), "pred", np.equal)
        yield f"setp.ne.{kind}", Operation((kind, kind), "pred", np.not_equal)
    for kind in ("b16", "b32", "b64", "f32"):
        yield f"selp.{kind}", Operation((kind, kind, "pred"), kind, _select)
    yield "bfe.u32", _same("u32", 3, _bit_field)


def _floats() -> Iterator[tuple[str, Operation]]:
    for kind in ("f32", "f32x2"):
        for suffix in (kind, f"rn.{kind}"):  # without rn, an assembler may fuse a product and a sum
            yield f"add.{suffix}", _same(kind, 2, np.add)
            yield f"sub.{suffix}", _same(kind, 2, np.subtract)
            yield f"mul.{suffix}", _same(kind, 2, np.multiply)
        yield f"fma.rn.{kind}", _same(kind, 3, lambda *values: fused_multiply_add(*values).astype(np.float32))
    for count in (2, 3):
        yield "max.f32", _same("f32", count, lambda *values: reduce(np.fmax, values))
    yield "neg.f32", _same("f32", 1, np.negative)
    yield "div.full.f32", _same("f32", 2, np.divide)
    yield "ex2.approx.f32", _same("f32", 1, lambda values: np.exp2(values.astype(np.float64)).astype(np.float32))
    yield "sqrt.approx.ftz.f32", _same("f32", 1, lambda values: np.sqrt(_flush_subnormals(values)))


def _narrow_floats() -> Iterator[tuple[str, Operation]]:
    for kind in ("f16", "f16x2"):
        yield f"add.{kind}", _same(kind, 2, np.add)
    for kind in ("bf16", "bf16x2"):
        yield f"add.{kind}", _same(kind, 2, _add_bfloat16)
        yield f"fma.rn.{kind}", _same(kind, 3, _fused_multiply_add_bfloat16)
    for kind, widen in (("f16", _half_to_float32), ("bf16", bfloat16_to_float32)):
        fma, add = _mixed(widen)
        yield f"fma.rn.f32.{kind}", Operation((kind, kind, "f32"), "f32", fma)
        yield f"add.rn.f32.{kind}", Operation((kind, "f32"), "f32", add)


def _conversions() -> Iterator[tuple[str, Operation]]:
    for kind, widen, narrow in (
        ("f16", _half_to_float32, _float32_to_half),
        ("bf16", bfloat16_to_float32, float32_to_bfloat16),
    ):
        yield f"cvt.f32.{kind}", Operation((kind,), "f32", widen)
        yield f"cvt.rn.{kind}.f32", Operation(("f32",), kind, narrow)
        yield f"cvt.rn.{kind}x2.f32", Operation(("f32", "f32"), f"{kind}x2", _packed(narrow))
    for result, source in (("u16", "u32"), ("s64", "s32"), ("u64", "u32")):
        dtype = element(result)
        yield f"cvt.{result}.{source}", Operation((source,), result, lambda a, dtype=dtype: a.astype(dtype))


def _half_to_float32(values: Values) -> Values:
    return values.astype(np.float32)


def _float32_to_half(values: Values) -> Values:
    return values.astype(np.float16)


def _mixed(widen: Callable[[Values], Values]) -> tuple[Callable[..., Values], Callable[..., Values]]:
    """Return the multiply-add and the addition whose last operand is float32."""

    def multiply_add(a: Values, b: Values, c: Values) -> Values:
        return fused_multiply_add(widen(a), widen(b), c).astype(np.float32)

    return multiply_add, lambda a, b: widen(a) + b


def _packed(narrow: Callable[[Values], Values]) -> Callable[..., Values]:
    """Return the conversion of two registers to one, the first to its upper half."""
    return lambda high, low: np.stack([narrow(low), narrow(high)], axis=-1).reshape(-1)


def _add_bfloat16(a: Values, b: Values) -> Values:
    return float32_to_bfloat16(bfloat16_to_float32(a) + bfloat16_to_float32(b))


def _fused_multiply_add_bfloat16(*values: Values) -> Values:
    return float64_to_bfloat16(fused_multiply_add(*map(bfloat16_to_float32, values)))


def _wide_product(a: Values, b: Values) -> Values:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    product: Values = a.astype(wide) * b
    return product


def _select(a: Values, b: Values, chosen: Values) -> Values:
    return np.where(chosen, a, b)


def _shift_left(values: Values, amount: Values) -> Values:
    return _shift(np.left_shift, values, amount)


def _shift_right(values: Values, amount: Values) -> Values:
    return _shift(np.right_shift, values, amount)


def _shift(shift: Callable[..., Values], values: Values, amount: Values) -> Values:
    """Shift; a signed number by as many bits more than it has gives its sign, an unsigned one 0."""
    last = np.uint32(8 * values.itemsize - 1)
    shifted = shift(values, np.minimum(amount, last).astype(values.dtype))
    return shifted if values.dtype.kind == "i" else np.where(amount <= last, shifted, np.zeros_like(values))


def _bit_field(values: Values, position: Values, length: Values) -> Values:
    shift, width = (np.minimum(one & 0xFF, 32).astype(np.uint64) for one in (position, length))
    field: Values = (values.astype(np.uint64) >> shift) & ((np.uint64(1) << width) - np.uint64(1))
    return field.astype(np.uint32)


def _flush_subnormals(values: Values) -> Values:
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


OPERATIONS: dict[tuple[str, int], Operation] = {
    (name, len(operation.sources)): operation
    for table in (_integers(), _bits(), _floats(), _narrow_floats(), _conversions())
    for name, operation in table
}
"""Operations by opcode and number of sources."""
