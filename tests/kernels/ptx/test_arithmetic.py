"""The interpreter's arithmetic against Python's integers and fractions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.handwritten_ptx import THREADS, Array, compute

from fusion_edge.kernels.ptx.arithmetic import OPERATIONS, element, register_bits

PRECISION = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126)}
"""Bits of the significand, and exponent of the smallest normal number."""
DECIMALS = Context(prec=60)
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
Reference = Callable[..., Any]


def rounded(value: Fraction, kind: str) -> float:
    """Return the nearest number of a type; of two, the even one."""
    precision, smallest = PRECISION[kind]
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    nearest = round(value / unit) * unit
    return float(nearest) if abs(nearest) < Fraction(2) ** (2 - smallest) else math.copysign(math.inf, nearest)


def integer_references() -> Iterator[tuple[str, Reference]]:
    for kind in ("s32", "u32", "s64", "u64"):
        yield f"add.{kind}", lambda a, b: a + b
        yield f"sub.{kind}", lambda a, b: a - b
        yield f"neg.{kind}", lambda a: -a
        yield f"mul.lo.{kind}", lambda a, b: a * b
        yield f"mad.lo.{kind}", lambda a, b, c: a * b + c
        yield f"rem.{kind}", lambda a, b: abs(a) % abs(b) * (1 if a > 0 else -1)
        yield f"shr.{kind}", lambda a, n: a >> n
        yield from ((f"setp.{name}.{kind}", compare) for name, compare in COMPARISONS.items())
    for kind in ("s32", "u32"):
        yield f"mul.wide.{kind}", lambda a, b: a * b
        yield f"mad.wide.{kind}", lambda a, b, c: a * b + c
    yield "bfe.u32", lambda a, position, length: (a >> (position & 255)) % 2 ** (length & 255)
    for conversion in ("u16.u32", "s64.s32", "u64.u32"):
        yield f"cvt.{conversion}", lambda a: a


def bit_references() -> Iterator[tuple[str, Reference]]:
    for kind in ("pred", "b16", "b32", "b64"):
        yield f"and.{kind}", operator.and_
        yield f"or.{kind}", operator.or_
        yield f"xor.{kind}", operator.xor
        yield f"not.{kind}", (lambda a: not a) if kind == "pred" else operator.invert
    for kind in ("b16", "b32", "b64"):
        yield f"shl.{kind}", lambda a, n: a << min(n, 64)
        yield f"setp.eq.{kind}", operator.eq
        yield f"setp.ne.{kind}", operator.ne
    for kind in ("b16", "b32", "b64", "f32"):
        yield f"selp.{kind}", lambda a, b, chosen: a if chosen else b


def float_references() -> Iterator[tuple[str, Reference]]:
    for kind in ("f32", "f32x2", "rn.f32", "rn.f32x2"):
        yield f"add.{kind}", lambda a, b: a + b
        yield f"sub.{kind}", lambda a, b: a - b
        yield f"mul.{kind}", lambda a, b: a * b
    for kind in ("f16", "f16x2", "bf16", "bf16x2"):
        yield f"add.{kind}", lambda a, b: a + b
    for kind in ("f32", "f32x2", "f32.f16", "f32.bf16", "bf16", "bf16x2"):
        yield f"fma.rn.{kind}", lambda a, b, c: a * b + c
    for kind in ("f16", "bf16"):
        yield f"add.rn.f32.{kind}", lambda a, b: a + b
        yield f"cvt.f32.{kind}", lambda a: a
        yield f"cvt.rn.{kind}.f32", lambda a: a
    yield "max.f32", max
    yield "neg.f32", operator.neg
    yield "div.full.f32", lambda a, b: a / b
    yield "ex2.approx.f32", lambda a: Fraction(DECIMALS.power(2, Decimal(float(a))))
    yield "sqrt.approx.ftz.f32", lambda a: Fraction(DECIMALS.sqrt(Decimal(float(a))))


REFERENCES = dict([*integer_references(), *bit_references(), *float_references()])
PACKING = {"cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"}


def test_every_operation_has_a_reference() -> None:
    assert {name for name, _ in OPERATIONS} == REFERENCES.keys() | PACKING


def is_float(kind: str) -> bool:
    return kind.removesuffix("x2") in PRECISION


def random_values(rng: np.random.Generator, kind: str) -> Array:
    """Return values that lie close together, ones of any size, and the ends of the range."""
    count = THREADS * (2 if kind.endswith("x2") else 1)
    if kind == "pred":
        return rng.integers(0, 2, count).astype(bool)
    dtype = element(kind)
    if is_float(kind):
        near = rng.standard_normal(count) * 2.0 ** rng.integers(-3, 4, count)
        far = near * 2.0 ** rng.integers(*((-20, 12) if kind.startswith("f16") else (-140, 100)), count)
        values = np.where(rng.random(count) < 0.7, near, far).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16) if kind.startswith("bf16") else values.astype(dtype)
    limits = np.iinfo(dtype)
    edges = np.array([limits.min, limits.max, 0, 1, 2, 31, 32, 63, 64, 255], dtype)
    anything = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    return np.where(rng.random(count) < 0.5, rng.choice(edges, count), anything).astype(dtype)


def exact(values: Array, kind: str) -> list[Any]:
    """Return Python's integers, booleans or fractions."""
    if not is_float(kind):
        return list(values.tolist())
    return [Fraction(float(value)) for value in numbers(values, kind)]


def numbers(values: Array, kind: str) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32) if kind.startswith("bf16") else values


def expected(name: str, sources: list[list[Any]], result: str) -> list[Any]:
    values = [REFERENCES[name](*one) for one in zip(*sources, strict=True)]
    if is_float(result):
        return [rounded(Fraction(value), result.removesuffix("x2")) for value in values]
    if result == "pred":
        return values
    bits = register_bits(result)
    return list(np.array([value % 2**bits for value in values], f"uint{bits}").view(element(result)).tolist())


@pytest.mark.parametrize(("name", "count"), [one for one in OPERATIONS if one[0] not in PACKING])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_operation(name: str, count: int, seed: int) -> None:
    operation, rng = OPERATIONS[name, count], np.random.default_rng(seed)
    sources = [random_values(rng, kind) for kind in operation.sources]
    if name.startswith(("rem.", "div.")):
        sources[1][sources[1] == 0] = 1
    if name.startswith("ex2."):
        sources[0] = np.clip(sources[0], -160, 160)  # beyond, the result is 0 or infinite
    if name.startswith("sqrt."):
        sources[0] = np.abs(sources[0])
        sources[0][sources[0] < 2.0**-126] = 0
    values = [exact(array, kind) for array, kind in zip(sources, operation.sources, strict=True)]
    actual = numbers(compute(name, operation.sources, operation.result, sources), operation.result)
    assert actual.tolist() == expected(name, values, operation.result)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_two_floats_to_one_register(kind: str) -> None:
    rng = np.random.default_rng(0)
    high, low = (random_values(rng, "f32") for _ in range(2))
    packed = numbers(compute(f"cvt.rn.{kind}x2.f32", ("f32", "f32"), f"{kind}x2", [high, low]), kind)
    for half, source in ((packed[1::2], high), (packed[::2], low)):
        assert half.tolist() == [rounded(value, kind) for value in exact(source, "f32")]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_fused_multiply_add_rounds_once(sign: int) -> None:
    """The product lies half way between two numbers, and the addend says which is nearer."""
    one = np.ones(THREADS, np.float32)
    factor, addend = np.float32(1 + 2**-12) * one, np.float32(sign * 2**-80) * one
    result = compute("fma.rn.f32", ("f32",) * 3, "f32", [factor, factor, addend])
    assert set(result.tolist()) == {1 + 2**-11 + (2**-23 if sign > 0 else 0)}
    factor, addend = ((value * one).view(np.uint32) >> 16 for value in (np.float32(1 + 2**-4), addend))
    bits = [value.astype(np.uint16) for value in (factor, factor, addend)]
    result = numbers(compute("fma.rn.bf16", ("bf16",) * 3, "bf16", bits), "bf16")
    assert set(result.tolist()) == {1 + 2**-3 + (2**-7 if sign > 0 else 0)}


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_fused_multiply_add_underflows_to_a_zero_of_its_sign(sign: int, kind: str) -> None:
    dtype = element(kind)
    tiny, factor, zero = (np.full(THREADS, value, np.float32) for value in (2**-100, sign * 2**-100, sign * 0.0))
    sources = [one.view(np.uint32) >> 16 if kind == "bf16" else one for one in (tiny, factor, zero)]
    result = compute(f"fma.rn.{kind}", (kind,) * 3, kind, [source.astype(dtype) for source in sources])
    assert {str(number) for number in numbers(result, kind).tolist()} == {str(sign * 0.0)}


def test_values_that_are_not_finite() -> None:
    special = np.resize(np.array([np.nan, np.inf, -np.inf, 1, 0], np.float32), THREADS)
    one = np.ones(THREADS, np.float32)

    def result(opcode: str, *sources: Array) -> list[float]:
        return list(compute(opcode, ("f32",) * len(sources), "f32", sources)[:5].tolist())

    assert result("max.f32", special, one) == [1, math.inf, 1, 1, 1]
    assert result("ex2.approx.f32", special)[1:] == [math.inf, 0, 2, 1]
    assert result("fma.rn.f32", special, one, one)[1:] == [math.inf, -math.inf, 2, 1]
    assert result("div.full.f32", one, special)[1:] == [0, 0, 1, math.inf]
    for opcode, sources in (("ex2.approx.f32", [special]), ("fma.rn.f32", [special, one, one])):
        assert math.isnan(result(opcode, *sources)[0])
    bits = compute("cvt.rn.bf16.f32", ("f32",), "bf16", [special])
    assert np.isnan(numbers(bits, "bf16")[0])
    assert numbers(bits, "bf16")[1:5].tolist() == [math.inf, -math.inf, 1, 0]


def test_square_roots_of_subnormals_are_0() -> None:
    tiny = np.full(THREADS, 2.0**-130, np.float32)
    assert not compute("sqrt.approx.ftz.f32", ("f32",), "f32", [tiny]).any()
