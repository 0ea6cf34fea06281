"""Random loads and stores of four threads in two blocks: a data race is found exactly where there is one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.handwritten_ptx import THREADS, kernel

from fusion_edge.kernels.ptx.errors import DataRace
from fusion_edge.kernels.ptx.machine import run

CELLS = 2


class Access(NamedTuple):
    """A load, or a store of ``value``, by a thread of the grid."""

    thread: int
    cell: int
    value: int | None

    @property
    def block(self) -> int:
        return self.thread // THREADS


def accesses() -> st.SearchStrategy[Access]:
    threads, cells = st.sampled_from([0, 1, THREADS, THREADS + 1]), st.integers(0, CELLS - 1)
    return st.builds(Access, threads, cells, st.sampled_from([None, 1, 2]))


def has_race(phases: list[list[Access]]) -> bool:
    """Compare every access with all before it that nothing orders."""
    memory = [0] * CELLS
    history: list[tuple[Access, int]] = []
    for phase, together in enumerate(phases):
        for access in together:
            unordered = [
                other
                for other, when in history
                if other.cell == access.cell and other.thread != access.thread
                if other.block != access.block or when == phase
            ]
            for other in unordered:
                is_store, other_is_store = access.value is not None, other.value is not None
                if (is_store or other_is_store) and not (
                    is_store and other_is_store and access.value == memory[access.cell]
                ):
                    return True
            if access.value is not None:
                memory[access.cell] = access.value
            history.append((access, phase))
    return False


def ptx(phases: list[list[Access]]) -> str:
    lines = [
        "ld.param.b64 %d0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;",
        "mov.u32 %r2, %ntid.x; mad.lo.s32 %r3, %r1, %r2, %r0;",
    ]
    for together in phases:
        for access in together:
            address = f"[%d0+{4 * access.cell}]"
            do = f"ld.global.b32 %r4, {address}" if access.value is None else f"st.global.b32 {address}, {access.value}"
            lines.append(f"setp.eq.u32 %p0, %r3, {access.thread}; @%p0 {do};")
        lines.append("bar.sync 0;")
    return kernel("\n".join(lines), 64)


@example([[Access(0, 0, None), Access(1, 0, None), Access(1, 0, 1)]])
@example([[Access(0, 0, 1), Access(1, 0, 1), Access(1, 0, 2)]])
@given(st.lists(st.lists(accesses(), max_size=4), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_races(phases: list[list[Access]]) -> None:
    try:
        run(ptx(phases), grid=2, block=THREADS, arguments=[np.zeros(CELLS, np.uint32)])
    except DataRace:
        assert has_race(phases)
    else:
        assert not has_race(phases)
