"""Registers of all threads. Each knows where its value is undefined.

A program may compute with undefined values, and Triton's do: in threads whose result nobody reads, or in one half of a
packed register. It may not store them, branch on them or use them as addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fusion_edge.kernels.ptx.arithmetic import STORAGE, element, register_bits
from fusion_edge.kernels.ptx.errors import InvalidPtx, Uninitialized
from fusion_edge.kernels.ptx.parser import Immediate, Kernel, Operand, Register
from fusion_edge.kernels.ptx.threads import Active, Launch, Mask, Values


class Registers:
    """Values by register, one for each thread of the launch."""

    def __init__(self, kernel: Kernel, launch: Launch) -> None:
        special = launch.special_registers()
        self._bits = kernel.registers | dict.fromkeys(special, 32)
        self._special, self._threads = special, launch.threads
        self._values: dict[str, Values] = dict(special)
        self._undefined: dict[str, Mask] = {}

    def bits(self, active: Active, operand: Operand) -> int:
        """Return the bits of a register, or 32 for a constant."""
        if isinstance(operand, Immediate):
            return 32
        return self._bits[self._name(active, operand)]

    def read(self, active: Active, operand: Operand, kind: str) -> Values:
        """Return an operand as an array of a type. A packed type has two elements a thread."""
        bits = register_bits(kind)
        if isinstance(operand, Immediate):
            return np.full(self._threads, operand.bits % 2**bits, np.uint64).astype(STORAGE[bits]).view(element(kind))
        name = self._name(active, operand)
        if self._bits[name] != bits:
            active.refuse(InvalidPtx, f"{name} has {self._bits[name]} bits, expected {bits}")
        if name not in self._values:
            return np.zeros(self._threads, STORAGE[bits]).view(element(kind))
        return self._values[name].view(element(kind))

    def undefined(self, operands: Iterable[Operand], elements: int = 1) -> Mask | None:
        """Return where one of the operands is undefined, ``[threads, elements]``; None: nowhere."""
        union: Mask | None = None
        for operand in operands:
            if isinstance(operand, Register) and (cells := self._undefined_cells(operand.name)) is not None:
                mask: Mask = np.any(cells.reshape(self._threads, elements, -1), axis=2)
                union = mask if union is None else union | mask
        return union

    def undefined_each(self, operands: Sequence[Operand]) -> Mask | None:
        """Return where each of the operands is undefined, ``[threads, operands]``; None: nowhere."""
        masks = [self.undefined([operand]) for operand in operands]
        if all(mask is None for mask in masks):
            return None
        nowhere = np.zeros((self._threads, 1), bool)
        return np.hstack([nowhere if mask is None else mask for mask in masks])

    def _undefined_cells(self, name: str) -> Mask | None:
        """Return which 16 bits of a register are undefined, ``[threads, bits / 16]``."""
        if name in self._values:
            return self._undefined.get(name)
        return np.ones((self._threads, _cells(self._bits[name])), bool)

    def require_defined(self, active: Active, operands: Iterable[Operand]) -> None:
        """Raise :class:`Uninitialized` if an operand is undefined in an active thread."""
        if (undefined := self.undefined(operands)) is not None:
            defined = ~undefined[active.mask, 0]
            active.require(defined, Uninitialized, "it depends on a register that has no value")

    def write(self, active: Active, operand: Operand, values: Values, undefined: Mask | None = None) -> None:
        """Set a register in the active threads; ``undefined`` is as :meth:`undefined` returns it."""
        if operand == Register("_"):
            return
        name = self._name(active, operand)
        bits = self._bits[name]
        values = np.ascontiguousarray(values).view(STORAGE[bits])
        if name in self._special or values.shape != (self._threads,):
            active.refuse(InvalidPtx, f"{name} cannot hold the result")
        cells = None if undefined is None else np.repeat(undefined, _cells(bits) // undefined.shape[1], axis=1)
        if not active.mask.all():
            cells = _chosen(active.mask, cells, self._undefined_cells(name))
            values = np.where(active.mask, values, self._values.get(name, np.zeros_like(values)))
        self._values[name] = values
        self._undefined.pop(name, None)
        if cells is not None and cells.any():
            self._undefined[name] = cells

    def _name(self, active: Active, operand: Operand) -> str:
        if isinstance(operand, Register) and operand.name in self._bits:
            return operand.name
        active.refuse(InvalidPtx, f"{operand} is not a register")


def _cells(bits: int) -> int:
    return max(bits // 16, 1)


def _chosen(mask: Mask, new: Mask | None, old: Mask | None) -> Mask | None:
    """Return ``new`` in the threads of ``mask`` and ``old`` in the others; None is False everywhere."""
    if new is None:
        return None if old is None else old & ~mask[:, None]
    return new & mask[:, None] if old is None else np.where(mask[:, None], new, old)
