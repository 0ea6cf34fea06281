"""Reads the PTX of one kernel, as LLVM writes it for Triton."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from fusion_edge.kernels.ptx.errors import InvalidPtx

SHARED_BASE = 16
"""Address of the dynamic shared memory. Not 0, so that code must use the symbol; aligned as declared, and no more."""


@dataclass(frozen=True)
class Register:
    """``%r1``; also special registers such as ``%tid.x``, and ``_``, which discards what is written."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: 64 bits in two's complement, or the 32 bits of a float."""

    bits: int


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; of a parameter, ``[name]``."""

    base: Register | Immediate | str
    offset: int


Scalar = Register | Immediate | str
"""A string is a label or the name of a parameter."""
Operand = Scalar | Address | tuple[Scalar, ...]
"""A tuple is a vector: ``{%r1, %r2}``."""


@dataclass(frozen=True)
class Instruction:
    """One instruction. It runs in threads whose ``guard`` is true, or false if ``guard_negated``."""

    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    used_bytes: int | None
    """Of a vector load: one bit for each byte that the program uses. None: all are used."""


@dataclass(frozen=True)
class Kernel:
    """An entry point."""

    name: str
    parameters: dict[str, int]
    """Bits of each parameter, in order."""
    threads: int
    """Threads per block that ``.reqntid`` asks for."""
    registers: dict[str, int]
    """Bits of each register; 1 for a predicate."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Position of the instruction that follows a label."""


def parse(ptx: str) -> Kernel:
    """Return the only kernel of a module. Raises :class:`InvalidPtx`."""
    text = re.sub(r"//[^\n]*", "", ptx)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*\.reqntid\s+(\d+)\s*\{", text))
    if len(entries) != 1:
        raise InvalidPtx(f"The PTX has {len(entries)} kernels with parameters and .reqntid, expected one.")
    (entry,) = entries
    symbols = dict.fromkeys(re.findall(r"\.extern\s+\.shared\s+\.align\s+16\s+\.b8\s+([\w$]+)\[\]", text), SHARED_BASE)
    end = text.rfind("}")
    return _Body(text, symbols).kernel(entry[1], _parameters(entry[2]), int(entry[3]), entry.end(), end)


def _parameters(declaration: str) -> dict[str, int]:
    parameters = {}
    for one in filter(None, map(str.strip, declaration.split(","))):
        if (found := re.fullmatch(r"\.param \.[bu](32|64)\b.*?([\w$]+)", one)) is None:
            raise InvalidPtx(f"A parameter is {one!r}, expected one of 32 or 64 bits.")
        parameters[found[2]] = int(found[1])
    return parameters


class _Body:
    """The statements of a kernel."""

    def __init__(self, text: str, symbols: dict[str, int]) -> None:
        self._text, self._symbols = text, symbols
        self._registers: dict[str, int] = {}
        self._instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        self._used_bytes: int | None = None

    def kernel(self, name: str, parameters: dict[str, int], threads: int, start: int, end: int) -> Kernel:
        for statement in re.finditer(r"\s*([\w$]+:(?!:)|[^;]+(?:;|$))", self._text[start:end]):
            line = 1 + self._text.count("\n", 0, start + statement.start(1))
            one = " ".join(statement[1].rstrip(";").split())
            if one.endswith(":"):
                self._labels[one[:-1]] = len(self._instructions)
            elif one.startswith("."):
                self._directive(one, line)
            elif one:
                self._instruction(one, line)
        if not self._instructions or self._instructions[-1].text != "ret":
            raise InvalidPtx(f"{name} does not end with ret.")
        targets = {label: at for label, at in self._labels.items() if at < len(self._instructions)}
        return Kernel(name, parameters, threads, self._registers, tuple(self._instructions), targets)

    def _directive(self, text: str, line: int) -> None:
        if registers := re.fullmatch(r"\.reg \.(pred|b16|b32|b64) (%\w+)<(\d+)>", text):
            bits = 1 if registers[1] == "pred" else int(registers[1][1:])
            self._registers |= {f"{registers[2]}{number}": bits for number in range(int(registers[3]))}
        elif used := re.fullmatch(r'\.pragma "used_bytes_mask (0x[0-9a-f]+)"', text):
            self._used_bytes = int(used[1], 16)
        else:
            _refuse(line, text, "unknown directive")

    def _instruction(self, text: str, line: int) -> None:
        found = re.fullmatch(r"(?:@(!?)(%\w+) )?([\w.]+)(?: (.*))?", text)
        if found is None:
            _refuse(line, text, "not an instruction")
        negated, guard, opcode, rest = found.groups()
        operands = [self._operand(one, line, text) for one in _split(rest or "")]
        register = None if guard is None else self._register(guard, line, text)
        one = Instruction(line, text, opcode, tuple(operands), register, bool(negated), self._used_bytes)
        self._instructions.append(one)
        self._used_bytes = None

    def _operand(self, operand: str, line: int, text: str) -> Operand:
        if operand.startswith("{") and operand.endswith("}"):
            return tuple(self._scalar(one.strip(), line, text) for one in operand[1:-1].split(","))
        if address := re.fullmatch(r"\[ ?([%\w$]+) ?(?:\+ ?(-?\d+) ?)?\]", operand):
            return Address(self._scalar(address[1], line, text), int(address[2] or 0))
        return self._scalar(operand, line, text)

    def _scalar(self, operand: str, line: int, text: str) -> Scalar:
        if operand.startswith("%") or operand == "_":
            return self._register(operand, line, text)
        if operand in self._symbols:
            return Immediate(self._symbols[operand])
        if bits := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return Immediate(int(bits[1], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return Immediate(int(operand, 0) % 2**64)
        if re.fullmatch(r"[\w$]+", operand):
            return operand
        _refuse(line, text, f"{operand} is no operand")

    def _register(self, name: str, line: int, text: str) -> Register:
        if name not in self._registers and name != "_" and "." not in name:
            _refuse(line, text, f"{name} is not declared")
        return Register(name)


def _split(operands: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [one.strip() for one in re.split(r",(?![^{\[]*[}\]])", operands) if one.strip()]


def _refuse(line: int, text: str, reason: str) -> NoReturn:
    raise InvalidPtx(f"Line {line}, {text!r}: {reason}.")
