"""Random calls of our CPU kernels, of which some are spoilt so that they must be refused."""

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
    integer_mlp,
    integer_product_case,
    product,
)

KINDS: tuple[Callable[[Random], Case], ...] = (
    product,
    integer_product_case,
    integer_mlp,
    activation,
    multi_head,
    packed_attention,
    causal,
    cached,
)
EXTREME = (0, -1, 2**31, 2**32, 2**62, -(2**62), 2**63 - 1, -(2**63))  # of an attribute


def draw(random: Random) -> Case:
    """A call of any operator. A third of them is spoilt."""
    case = KINDS[int(random.integers(len(KINDS)))](random)
    return spoil(case, random) if random.random() < 1 / 3 else case


def spoil(case: Case, random: Random) -> Case:
    """A call that is wrong in one thing, so that it must be refused; the same if nothing of it can be."""
    ways: list[Callable[[Case, Random], Case | None]]
    ways = [_wrong_attribute, _other_type, _another_size, _nothing, _unknown_input, _missing_input]
    for way in random.permutation(len(ways)):
        if spoilt := ways[int(way)](case, random):
            return replace(spoilt, check=None)
    return case


def _with_input(case: Case, place: int, array: Array | None) -> Case:
    return replace(case, inputs=(*case.inputs[:place], array, *case.inputs[place + 1 :]))


def _one_of(random: Random, places: tuple[Any, ...]) -> Any:
    return places[random.integers(len(places))]


def _wrong_attribute(case: Case, random: Random) -> Case | None:
    floats = tuple(name for name, value in case.attributes.items() if isinstance(value, float))
    if floats and random.random() < 0.3:
        return replace(case, attributes={**case.attributes, _one_of(random, floats): _one_of(random, NOT_FINITE)})
    if not case.counts:
        return None
    return replace(case, attributes={**case.attributes, _one_of(random, case.counts): _one_of(random, EXTREME)})


def _other_type(case: Case, random: Random) -> Case | None:
    names = tuple(name for name in case.attributes if name != "accuracy_level")
    if not names:
        return None
    name = _one_of(random, names)
    others: dict[type, tuple[Attribute, ...]] = {int: (1.0, "1"), float: (1, "1"), str: (1, 1.0)}
    return replace(case, attributes={**case.attributes, name: _one_of(random, others[type(case.attributes[name])])})


def _another_size(case: Case, random: Random) -> Case | None:
    if not case.fixed:
        return None
    place = _one_of(random, case.fixed)
    array = case.inputs[place]
    assert array is not None
    if not array.ndim:
        return _with_input(case, place, np.repeat(array, 2))
    axis = random.integers(array.ndim)
    change = int(random.choice([-1, 1, 5]))
    sizes = [max(0, size + change) if i == axis else size for i, size in enumerate(array.shape)]
    return _with_input(case, place, np.resize(array, sizes)) if np.prod(sizes) != array.size else None


def _nothing(case: Case, random: Random) -> Case | None:
    """A tensor of no value, of a plain or of a far too large shape."""
    if not case.fixed:
        return None
    place = _one_of(random, case.fixed)
    array = case.inputs[place]
    assert array is not None
    shapes: tuple[tuple[int, ...], ...] = ((0,), (0,) * array.ndim, (0, 2**40))
    shape = _one_of(random, shapes)
    return _with_input(case, place, np.zeros(shape, array.dtype)) if array.size and 0 in shape else None


def _unknown_input(case: Case, random: Random) -> Case | None:
    if not case.unknown:
        return None
    return _with_input(case, _one_of(random, case.unknown), np.zeros((1, 1), np.float32))


def _missing_input(case: Case, random: Random) -> Case | None:
    """Of those without which there is nothing to compute."""
    optional = {"MatMulNBits": 3, "GeluMatMulNBits": 3, "MultiHeadAttention": 3}
    given = [place for place, array in enumerate(case.inputs) if array is not None]
    places = tuple(place for place in given if place < optional.get(case.operator[1], len(case.inputs)))
    return _with_input(case, _one_of(random, places), None)
