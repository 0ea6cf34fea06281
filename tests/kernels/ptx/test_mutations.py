"""Kernels and launches with one defect: the check that finds it. Without a check's error, the result must be wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.alignment_cases import Case, case
from support.alignment_kernels import NARROW, WIDE
from support.plugin_launches import Launch, launch

from fusion_edge.kernels.onnx_functions.alignment import ADD_LAYER_NORM, ADD_ROWS, CONTEXT_ATTENTION
from fusion_edge.kernels.ptx.errors import (
    DataRace,
    InvalidLaunch,
    Misaligned,
    OutOfBounds,
    PtxError,
    Uninitialized,
    UnknownInstruction,
)

Mutation = Callable[[Launch], Launch]


def swap(first: int, second: int) -> Mutation:
    """Exchange two arguments."""

    def mutate(one: Launch) -> Launch:
        arguments: list[Any] = [*one.inputs, *one.integers, one.output]
        arguments[first], arguments[second] = arguments[second], arguments[first]
        count = len(one.inputs)
        return replace(one, inputs=tuple(arguments[:count]), integers=tuple(arguments[count:-1]), output=arguments[-1])

    return mutate


def grid(x: int, y: int) -> Mutation:
    """Launch more or fewer blocks."""
    return lambda one: replace(one, grid=(one.grid[0] + x, one.grid[1] + y))


def one_row_more(one: Launch) -> Launch:
    """Launch a block for one row more, and say that there is one."""
    rows, *others = one.integers
    return replace(one, grid=(one.grid[0] + 1, one.grid[1]), integers=(rows + 1, *others))


def less_shared_memory(one: Launch) -> Launch:
    return replace(one, shared_bytes=one.shared_bytes - 4)


def edit(pattern: str, replacement: str, *, last: bool = False) -> Mutation:
    """Replace the first or last match in the PTX."""

    def mutate(one: Launch) -> Launch:
        found = list(re.finditer(pattern, one.ptx))[-1 if last else 0]
        return replace(one, ptx=one.ptx[: found.start()] + found.expand(replacement) + one.ptx[found.end() :])

    return mutate


def outcome(one: Case, mutated: Launch) -> type[PtxError] | None:
    """Return the check that fails. None: the kernel runs."""
    try:
        mutated.run()
    except PtxError as error:
        return type(error)
    return None


SWAPS = [
    (CONTEXT_ATTENTION, "q and k", swap(0, 1), OutOfBounds),
    (CONTEXT_ATTENTION, "k and v", swap(1, 2), None),
    (CONTEXT_ATTENTION, "q and output", swap(0, 5), None),
    (CONTEXT_ATTENTION, "rows and latents", swap(3, 4), None),
    (CONTEXT_ATTENTION, "v and rows", swap(2, 3), InvalidLaunch),
    (ADD_LAYER_NORM, "residual and weight", swap(1, 2), OutOfBounds),
    (ADD_LAYER_NORM, "weight and bias", swap(2, 3), None),
    (ADD_LAYER_NORM, "rows and output", swap(4, 5), InvalidLaunch),
    (ADD_ROWS, "x and positions", swap(0, 1), None),
    (ADD_ROWS, "positions and latents", swap(1, 2), OutOfBounds),
    (ADD_ROWS, "rows and length", swap(4, 5), None),
    (ADD_ROWS, "update and output", swap(3, 6), OutOfBounds),
]
LAUNCHES = [
    (CONTEXT_ATTENTION, "a row less", grid(-1, 0), None),
    (CONTEXT_ATTENTION, "a head less", grid(0, -1), None),
    (CONTEXT_ATTENTION, "a head more", grid(0, 1), OutOfBounds),
    (CONTEXT_ATTENTION, "less shared memory", less_shared_memory, OutOfBounds),
    (ADD_LAYER_NORM, "a row less", grid(-1, 0), None),
    (ADD_LAYER_NORM, "less shared memory", less_shared_memory, OutOfBounds),
    (ADD_ROWS, "a row less", grid(-1, 0), None),
    *(
        (operator, "a row more", one_row_more, OutOfBounds)
        for operator in (CONTEXT_ATTENTION, ADD_LAYER_NORM, ADD_ROWS)
    ),
]
INSTRUCTIONS = [
    (CONTEXT_ATTENTION, "store elsewhere", edit(r"(st\.global.*) \+ 0", r"\1 + 2"), OutOfBounds),
    (
        CONTEXT_ATTENTION,
        "undefined columns",
        edit(r"mov\.u16 %rs\d+, %rs\d+;\s*(@%p\d+ ld\.global)", r"\1"),
        Uninitialized,
    ),
    (CONTEXT_ATTENTION, "read too much", edit(r"@%p\d+ (ld\.global)", r"\1"), OutOfBounds),
    (CONTEXT_ATTENTION, "share elsewhere", edit(r"(st\.shared.*) \+ 0", r"\1 + 4"), Uninitialized),
    (CONTEXT_ATTENTION, "no store", edit(r"@%p\d+ st\.global.*", ""), None),
    (CONTEXT_ATTENTION, "share nothing", edit(r"@%p\d+ st\.shared.*", ""), Uninitialized),
    (ADD_LAYER_NORM, "store elsewhere", edit(r"(st\.global.*) \+ 0", r"\1 + 2"), Misaligned),
    (ADD_LAYER_NORM, "store beyond the row", edit(r"@%p\d+ (st\.global)", r"\1"), OutOfBounds),
    (ADD_LAYER_NORM, "read in the wrong phase", edit(r"(ld\.shared.*) \+ 0", r"\1 + 4", last=True), OutOfBounds),
    (ADD_LAYER_NORM, "float32 for float16", edit(r"cvt\.f32\.f16", "cvt.f32.u16"), UnknownInstruction),
    (ADD_ROWS, "store elsewhere", edit(r"(st\.global.*) \+ 0", r"\1 + 2"), Misaligned),
    (ADD_ROWS, "store to the neighbor", edit(r"(st\.global.*) \+ 0", r"\1 + 4"), None),
    (
        ADD_ROWS,
        "position of another row",
        edit(r"mad\.wide\.u32 (\s*%rd\d+, %r\d+), 8", r"mad.wide.u32 \1, 0"),
        DataRace,
    ),
]


@pytest.mark.parametrize("architecture", ["87", "120"])
@pytest.mark.parametrize(
    ("operator", "mutation", "expected"),
    [(operator, *rest) for operator, _, *rest in SWAPS + LAUNCHES + INSTRUCTIONS],
    ids=[f"{operator}-{name}" for operator, name, *_ in SWAPS + LAUNCHES + INSTRUCTIONS],
)
def test_mutations(
    operator: str, mutation: Mutation, expected: type[PtxError] | None, architecture: str, kernels: Path
) -> None:
    one = case(operator, "fp16", 2, 3, NARROW)
    assert outcome(one, mutation(launch(one, kernels, architecture))) is expected
    assert not one.is_right()


@pytest.mark.parametrize("architecture", ["87", "120"])
@pytest.mark.parametrize("width", [NARROW, WIDE[0]])
@pytest.mark.parametrize("operator", [CONTEXT_ATTENTION, ADD_LAYER_NORM])
def test_every_barrier_is_needed(operator: str, width: int, architecture: str, kernels: Path) -> None:
    one = case(operator, "fp16", 1, 1, width)
    original = launch(one, kernels, architecture)
    barriers = list(re.finditer(r"bar\.sync\s+0;", original.ptx))
    assert len(barriers) >= 4
    for barrier in barriers:
        ptx = original.ptx[: barrier.start()] + original.ptx[barrier.end() :]
        with pytest.raises(DataRace):
            replace(original, ptx=ptx).run()


@pytest.mark.parametrize("operator", [CONTEXT_ATTENTION, ADD_LAYER_NORM, ADD_ROWS])
def test_blocks_after_the_last_row_do_nothing(operator: str, kernels: Path) -> None:
    one = case(operator, "fp16", 2, 3, NARROW)
    grid(2, 0)(launch(one, kernels, "87")).run()
    assert one.is_right()


def test_positions_outside_of_the_sequence_are_skipped(kernels: Path) -> None:
    one = case(ADD_ROWS, "fp16", 1, 3, NARROW)
    before = one.output.copy()
    one.inputs[1][:] = -1, before.shape[1], 2**40
    launch(one, kernels, "87").run()
    assert (one.output == before).all()


def test_two_latents_at_one_position(kernels: Path) -> None:
    """Blocks write different values to one row, and nothing orders blocks."""
    one = case(ADD_ROWS, "fp16", 1, 3, NARROW)
    one.inputs[1][:] = 5
    assert outcome(one, launch(one, kernels, "87")) is DataRace
