"""Runs a PTX kernel on the CPU: all threads of a grid in lockstep, as numpy arrays, with every access checked.

Threads that branch apart run in turn, those that are behind first, so they meet again where their code does. The checks
are the classes of ``errors.py``; ``memory.py`` says what a data race is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.kernels.ptx.errors import InvalidLaunch, InvalidPtx
from fusion_edge.kernels.ptx.instructions import State, execute
from fusion_edge.kernels.ptx.memory import GlobalMemory, SharedMemory
from fusion_edge.kernels.ptx.parser import Kernel, parse
from fusion_edge.kernels.ptx.registers import Registers
from fusion_edge.kernels.ptx.threads import WARP, Active, Launch, Mask

_parse = lru_cache(maxsize=64)(parse)


def run(
    ptx: str,
    *,
    grid: int | tuple[int, ...],
    block: int,
    arguments: Sequence[npt.NDArray[Any] | int],
    shared_bytes: int = 0,
) -> None:
    """Run the only kernel of a PTX module.

    ``grid`` is the number of blocks, or of blocks along x, y and z; ``block`` the threads of each. ``arguments`` are
    the kernel's parameters in order: arrays are buffers, changed in place (an array that is given twice is one buffer);
    integers have 32 bits. ``shared_bytes`` is the dynamic shared memory of a block.

    Raises :class:`~fusion_edge.kernels.ptx.errors.PtxError` with instruction, line, block and thread; then no array
    changes.
    """
    kernel = _parse(ptx)
    launch = _launch(kernel, (grid,) if isinstance(grid, int) else grid, block)
    buffers = GlobalMemory([argument for argument in arguments if isinstance(argument, np.ndarray)])
    memory = {"global": buffers, "shared": SharedMemory(launch, shared_bytes)}
    phases = np.zeros(launch.threads, np.int64)
    state = State(Registers(kernel, launch), memory, _parameters(kernel, arguments, buffers), phases)
    waiting = {0: np.ones(launch.threads, bool)}
    while waiting:
        position = min(waiting)
        for following, threads in _step(kernel, launch, state, position, waiting.pop(position)):
            if threads.any():
                waiting[following] = waiting[following] | threads if following in waiting else threads
    buffers.copy_back()


def _step(kernel: Kernel, launch: Launch, state: State, position: int, threads: Mask) -> Iterator[tuple[int, Mask]]:
    """Execute an instruction in ``threads``; yield which of them continue where."""
    instruction = kernel.instructions[position]
    active = Active(instruction, launch, threads, state.phases)
    if instruction.guard is not None:
        state.registers.require_defined(active, [instruction.guard])
        holds = state.registers.read(active, instruction.guard, "pred") != instruction.guard_negated
        active = Active(instruction, launch, threads & holds, state.phases)
    if instruction.opcode in ("bra", "bra.uni"):
        yield _target(kernel, active), active.mask
    elif instruction.opcode != "ret":
        if active.mask.any():
            execute(state, active)
        yield position + 1, threads
        return
    yield position + 1, threads & ~active.mask


def _target(kernel: Kernel, active: Active) -> int:
    for label in active.instruction.operands[:1]:
        if isinstance(label, str) and label in kernel.labels:
            return kernel.labels[label]
    active.refuse(InvalidPtx, "it has no label of this kernel")


def _launch(kernel: Kernel, grid: tuple[int, ...], block: int) -> Launch:
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise InvalidLaunch(f"The grid is {grid}, expected one to three numbers of blocks, each at least 1.")
    if block != kernel.threads or block % WARP:
        raise InvalidLaunch(f"The block has {block} threads, expected the {kernel.threads} of {kernel.name}.")
    x, y, z = (*grid, 1, 1)[:3]
    return Launch((x, y, z), block)


def _parameters(
    kernel: Kernel, arguments: Sequence[npt.NDArray[Any] | int], memory: GlobalMemory
) -> dict[str, tuple[int, int]]:
    """Return bits and value of each parameter by name."""
    if len(arguments) != len(kernel.parameters):
        raise InvalidLaunch(f"{len(arguments)} arguments, expected the {len(kernel.parameters)} of {kernel.name}.")
    values = {}
    for (name, bits), argument in zip(kernel.parameters.items(), arguments, strict=True):
        if isinstance(argument, np.ndarray):
            given, value = 64, memory.address(argument)
        else:
            given, value = 32 if -(2**31) <= argument < 2**32 else 0, int(argument)
        if given != bits:
            expected = "an array" if bits == 64 else "an integer of 32 bits"
            raise InvalidLaunch(f"{name} is {type(argument).__name__}, expected {expected}.")
        values[name] = (bits, value)
    return values
