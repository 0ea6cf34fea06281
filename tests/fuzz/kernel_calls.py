"""Random calls of the CPU kernels, some of them invalid so that the kernels must report an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fuzz.attention_cases import cached, causal, multi_head, packed_attention
from fuzz.fake_onnxruntime import Attribute
from fuzz.kernel_cases import (
    NOT_FINITE,
    Array,
    Case,
    Random,
    activation,
    integer_matmul,
    integer_mlp,
    matmul_nbits,
)

KINDS: tuple[Callable[[Random], Case], ...] = (
    matmul_nbits,
    integer_matmul,
    integer_mlp,
    activation,
    multi_head,
    packed_attention,
    causal,
    cached,
)
EXTREME = (0, -1, 2**31, 2**32, 2**62, -(2**62), 2**63 - 1, -(2**63))  # of an attribute


def draw(random: Random) -> Case:
    """Return a call of any operator, invalid in a third of the draws."""
    case = KINDS[int(random.integers(len(KINDS)))](random)
    return invalidate(case, random) if random.random() < 1 / 3 else case


def invalidate(case: Case, random: Random) -> Case:
    """Return ``case`` with one error, or unchanged if no way applies to it."""
    ways: list[Callable[[Case, Random], Case | None]]
    ways = [_wrong_value, _wrong_type, _wrong_shape, _empty_input, _unsupported_input, _missing_input]
    for way in random.permutation(len(ways)):
        if invalid := ways[int(way)](case, random):
            return replace(invalid, check=None)
    return case


def _with_input(case: Case, name: str, array: Array | None) -> Case:
    return replace(case, inputs={**case.inputs, name: array})


def _one_of(random: Random, items: tuple[Any, ...]) -> Any:
    return items[random.integers(len(items))]


def _wrong_value(case: Case, random: Random) -> Case | None:
    floats = tuple(name for name, value in case.attributes.items() if isinstance(value, float))
    if floats and random.random() < 0.3:
        return replace(case, attributes={**case.attributes, _one_of(random, floats): _one_of(random, NOT_FINITE)})
    if not case.counts:
        return None
    return replace(case, attributes={**case.attributes, _one_of(random, case.counts): _one_of(random, EXTREME)})


def _wrong_type(case: Case, random: Random) -> Case | None:
    names = tuple(name for name in case.attributes if name != "accuracy_level")
    if not names:
        return None
    name = _one_of(random, names)
    others: dict[type, tuple[Attribute, ...]] = {int: (1.0, "1"), float: (1, "1"), str: (1, 1.0)}
    return replace(case, attributes={**case.attributes, name: _one_of(random, others[type(case.attributes[name])])})


def _wrong_shape(case: Case, random: Random) -> Case | None:
    if not case.dependent:
        return None
    name = _one_of(random, case.dependent)
    array = case.inputs[name]
    assert array is not None
    if not array.ndim:
        return _with_input(case, name, np.repeat(array, 2))
    axis = random.integers(array.ndim)
    change = int(random.choice([-1, 1, 5]))
    sizes = [max(0, size + change) if i == axis else size for i, size in enumerate(array.shape)]
    return _with_input(case, name, np.resize(array, sizes)) if np.prod(sizes) != array.size else None


def _empty_input(case: Case, random: Random) -> Case | None:
    """Return ``case`` with an empty input, whose shape may have a huge axis."""
    if not case.dependent:
        return None
    name = _one_of(random, case.dependent)
    array = case.inputs[name]
    assert array is not None
    shapes: tuple[tuple[int, ...], ...] = ((0,), (0,) * array.ndim, (0, 2**40))
    shape = _one_of(random, shapes)
    return _with_input(case, name, np.zeros(shape, array.dtype)) if array.size and 0 in shape else None


def _unsupported_input(case: Case, random: Random) -> Case | None:
    if not case.unsupported:
        return None
    return _with_input(case, _one_of(random, case.unsupported), np.zeros((1, 1), np.float32))


def _missing_input(case: Case, random: Random) -> Case | None:
    """Return ``case`` without an input that the kernel needs."""
    needed = list(case.operator.inputs)
    if case.operator.name != "GroupQueryAttention":  # declares only the query as required, but needs more
        needed = needed[: case.operator.required]
    names = tuple(name for name in needed if case.inputs.get(name) is not None)
    return _with_input(case, _one_of(random, names), None)
