"""Instructions of PTX but for branches: memory, warps and barriers here, arithmetic in ``arithmetic.py``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusion_edge.kernels.ptx.arithmetic import OPERATIONS, element, register_bits
from fusion_edge.kernels.ptx.errors import (
    DivergentThreads,
    InvalidPtx,
    Misaligned,
    UndefinedResult,
    UnknownInstruction,
)
from fusion_edge.kernels.ptx.memory import CELL, Memory
from fusion_edge.kernels.ptx.parser import Address, Immediate, Operand, Scalar
from fusion_edge.kernels.ptx.registers import Registers
from fusion_edge.kernels.ptx.threads import WARP, Active, Indices, Mask, Values

MATRIX_ROW = 16
"""Bytes of a row of a matrix of ``ldmatrix`` and ``stmatrix``: eight elements, two for each of four threads."""


@dataclass(frozen=True)
class State:
    """What the instructions of a launch change."""

    registers: Registers
    memory: dict[str, Memory]
    """By state space: ``global`` and ``shared``."""
    parameters: dict[str, tuple[int, int]]
    """Bits and value by name."""
    phases: Indices
    """Barriers that each thread has passed."""


def execute(state: State, active: Active) -> None:
    """Execute an instruction, other than a branch or ``ret``, in the active threads."""
    _INSTRUCTIONS.get(active.instruction.opcode.split(".")[0], _compute)(state, active)


def _compute(state: State, active: Active) -> None:
    """Compute a register from others."""
    opcode, (result, *sources) = active.instruction.opcode, _operands(active)
    if (operation := OPERATIONS.get((opcode, len(sources)))) is None:
        active.refuse(UnknownInstruction, f"the interpreter knows no {opcode} of {len(sources)} sources")
    values = [
        state.registers.read(active, source, kind) for source, kind in zip(sources, operation.sources, strict=True)
    ]
    if opcode.startswith("rem."):
        active.require(values[1][active.mask] != 0, UndefinedResult, "it divides by zero")
    with np.errstate(all="ignore"):
        computed = operation.function(*values)
    elements = 2 if operation.result.endswith("x2") and operation.result in operation.sources else 1
    state.registers.write(active, result, computed, state.registers.undefined(sources, elements))


def _move(state: State, active: Active) -> None:
    """Copy a register, join a vector to one, or split one into a vector."""
    (kind,) = _opcode(active, r"mov\.(pred|[bu](?:16|32|64))")
    result, source = _operands(active, 2)
    registers = state.registers
    if isinstance(source, tuple):
        part = _part(active, kind, source)
        values = np.stack([registers.read(active, one, part) for one in source], axis=-1).reshape(-1)
        registers.write(active, result, values.view(element(kind)), registers.undefined_each(source))
    elif isinstance(result, tuple):
        parts = element(_part(active, kind, result))
        split = registers.read(active, source, kind).view(parts).reshape(-1, len(result))
        undefined = registers.undefined([source], len(result))
        for index, one in enumerate(result):
            mask = None if undefined is None else undefined[:, index : index + 1]
            registers.write(active, one, split[:, index], mask)
    else:
        registers.write(active, result, registers.read(active, source, kind), registers.undefined([source]))


def _part(active: Active, kind: str, vector: tuple[Scalar, ...]) -> str:
    """Return the type of the elements of a vector that is as wide as a register of type ``kind``."""
    bits = register_bits(kind) // len(vector)
    if bits not in (16, 32):
        active.refuse(UnknownInstruction, f"the interpreter knows no vectors of {bits} bits")
    return f"b{bits}"


def _load(state: State, active: Active) -> None:
    """Load from global or shared memory, or a parameter."""
    if active.instruction.opcode.startswith("ld.param."):
        return _load_parameter(state, active)
    space, count, kind = _access(active)
    result, address = _operands(active, 2)
    registers, is_used = _vector(active, result, count), _used_cells(active, count, kind)
    values = np.zeros((len(active.mask), count), element(kind))
    loaded = state.memory[space].load(active, _addresses(state, active, address), is_used.reshape(-1))
    values[active.mask] = loaded.view(values.dtype)
    for register, value, known in zip(registers, values.T, np.all(is_used, axis=1), strict=True):
        state.registers.write(active, register, value, None if known else np.ones((len(active.mask), 1), bool))


def _used_cells(active: Active, count: int, kind: str) -> Values:
    """Return which cells of a vector load the program uses, ``[elements, cells of one]``."""
    cells = count * register_bits(kind) // (8 * CELL)
    used = active.instruction.used_bytes
    is_used = [used is None or used >> (CELL * cell) & 0b11 != 0 for cell in range(cells)]
    return np.array(is_used).reshape(count, -1)


def _load_parameter(state: State, active: Active) -> None:
    (kind,) = _opcode(active, r"ld\.param\.([bu](?:32|64))")
    result, address = _operands(active, 2)
    name = address.base if isinstance(address, Address) and address.offset == 0 else None
    bits, value = state.parameters.get(name, (0, 0)) if isinstance(name, str) else (0, 0)
    if bits != register_bits(kind):
        active.refuse(InvalidPtx, f"there is no such parameter of {register_bits(kind)} bits")
    values = np.full(len(active.mask), value % 2**bits, np.uint64).astype(element(kind))
    state.registers.write(active, result, values)


def _store(state: State, active: Active) -> None:
    """Store to global or shared memory."""
    space, count, kind = _access(active)
    address, source = _operands(active, 2)
    sources = _vector(active, source, count)
    state.registers.require_defined(active, sources)
    values = np.stack([state.registers.read(active, one, kind)[active.mask] for one in sources], axis=-1)
    state.memory[space].store(active, _addresses(state, active, address), values.view(np.uint16))


def _load_matrix(state: State, active: Active) -> None:
    """Load a matrix of 8 x 8 elements of 16 bits for each warp: thread t gets two elements of row t / 4."""
    _opcode(active, r"ldmatrix\.sync\.aligned\.m8n8\.x1\.shared\.b16")
    result, address = _operands(active, 2)
    (register,) = _vector(active, result, 1)
    values, both = np.zeros(len(active.mask), np.uint32), np.ones(2, bool)
    loaded = state.memory["shared"].load(active, _matrix_addresses(state, active, address), both)
    values[active.mask] = loaded.view(np.uint32)[:, 0]
    state.registers.write(active, register, values)


def _store_matrix(state: State, active: Active) -> None:
    """Store a matrix as ``ldmatrix`` loads it."""
    _opcode(active, r"stmatrix\.sync\.aligned\.m8n8\.x1\.shared\.b16")
    address, source = _operands(active, 2)
    (register,) = _vector(active, source, 1)
    state.registers.require_defined(active, [register])
    values = state.registers.read(active, register, "b32")[active.mask]
    addresses = _matrix_addresses(state, active, address)
    state.memory["shared"].store(active, addresses, values.view(np.uint16).reshape(-1, 2))


def _matrix_addresses(state: State, active: Active, address: Operand) -> Indices:
    """Return the address of each thread's two elements. The first eight threads of a warp hold those of the rows."""
    _require_whole_warps(active)
    position = np.arange(len(active.threads))
    rows = _addresses(state, active, address)[position // WARP * WARP + position % WARP // 4]
    active.require(rows % MATRIX_ROW == 0, Misaligned, f"a row's address is no multiple of {MATRIX_ROW} bytes")
    addresses: Indices = rows + position % 4 * 4
    return addresses


def _shuffle(state: State, active: Active) -> None:
    """Exchange a register between the threads of a warp."""
    _opcode(active, r"shfl\.sync\.bfly\.b32")
    result, source, distance, clamp, members = _operands(active, 5)
    if clamp != Immediate(31) or not isinstance(members, Immediate) or members.bits % 2**32 != 2**32 - 1:
        active.refuse(UnknownInstruction, "the interpreter knows shuffles of whole warps only")
    if not isinstance(distance, Immediate) or distance.bits >= WARP:
        active.refuse(UnknownInstruction, f"the interpreter knows constant distances below {WARP} only")
    _require_whole_warps(active)
    partner = np.arange(len(active.mask)) ^ distance.bits
    undefined = state.registers.undefined([source])
    values = state.registers.read(active, source, "b32")[partner]
    state.registers.write(active, result, values, None if undefined is None else undefined[partner])


def _require_whole_warps(active: Active) -> None:
    whole: Mask = np.all(active.mask.reshape(-1, WARP), axis=1)
    active.require(whole[active.threads // WARP], DivergentThreads, "not all threads of the warp execute it")


def _barrier(state: State, active: Active) -> None:
    """Wait for all threads of the block."""
    _opcode(active, r"bar\.sync")
    if _operands(active, 1) != (Immediate(0),):
        active.refuse(UnknownInstruction, "the interpreter knows barrier 0 only")
    whole: Mask = np.all(active.mask.reshape(-1, active.launch.block), axis=1)
    blocks = active.threads // active.launch.block
    active.require(whole[blocks], DivergentThreads, "not all threads of the block reach it")
    state.phases[active.mask] += 1


_INSTRUCTIONS: dict[str, Callable[[State, Active], None]] = {
    "bar": _barrier,
    "ld": _load,
    "ldmatrix": _load_matrix,
    "mov": _move,
    "shfl": _shuffle,
    "st": _store,
    "stmatrix": _store_matrix,
}
"""By the first word of the opcode."""


def _opcode(active: Active, pattern: str) -> tuple[str, ...]:
    """Return the groups of ``pattern``, which the opcode must match."""
    if (found := re.fullmatch(pattern, active.instruction.opcode)) is None:
        active.refuse(UnknownInstruction, "the interpreter does not know this instruction")
    return found.groups()


def _access(active: Active) -> tuple[str, int, str]:
    """Return state space, number of elements and type of a load or store."""
    space, count, bits = _opcode(active, r"(?:ld|st)\.(global|shared)(?:\.v([24]))?\.[bu](16|32|64)")
    return space, int(count or 1), f"b{bits}"


def _operands(active: Active, count: int | None = None) -> tuple[Operand, ...]:
    operands = active.instruction.operands
    if not operands or count not in (None, len(operands)):
        active.refuse(InvalidPtx, f"it has {len(operands)} operands")
    return operands


def _vector(active: Active, operand: Operand, count: int) -> tuple[Operand, ...]:
    """Return the elements of a vector; another operand is its only element."""
    vector = operand if isinstance(operand, tuple) else (operand,)
    if len(vector) != count:
        active.refuse(InvalidPtx, f"expected a vector of {count}")
    return vector


def _addresses(state: State, active: Active, address: Operand) -> Indices:
    """Return the address in each active thread."""
    if not isinstance(address, Address) or isinstance(address.base, str):
        active.refuse(InvalidPtx, "expected an address")
    state.registers.require_defined(active, [address.base])
    if (bits := state.registers.bits(active, address.base)) not in (32, 64):
        active.refuse(InvalidPtx, f"an address has {bits} bits")
    return state.registers.read(active, address.base, f"s{bits}")[active.mask].astype(np.int64) + address.offset
