"""The threads of a launch, and those of them that execute an instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fusion_edge.kernels.ptx.errors import PtxError
from fusion_edge.kernels.ptx.parser import Instruction

Values = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
WARP = 32


@dataclass(frozen=True)
class Launch:
    """Sizes of a launch. Threads are numbered through all blocks, x first."""

    grid: tuple[int, int, int]
    block: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        x, y, z = self.grid
        return x * y * z

    @property
    def threads(self) -> int:
        """Number of threads of all blocks."""
        return self.blocks * self.block

    def special_registers(self) -> dict[str, Values]:
        """Return the value of every special register in each thread."""
        block, thread = np.divmod(np.arange(self.threads, dtype=np.uint32), np.uint32(self.block))
        x, y, z = self.grid
        values: dict[str, npt.ArrayLike] = {
            "%tid.x": thread,
            "%ntid.x": self.block,
            "%ctaid.x": block % x,
            "%ctaid.y": block // x % y,
            "%ctaid.z": block // (x * y),
            "%nctaid.x": x,
            "%nctaid.y": y,
            "%nctaid.z": z,
        }
        return {name: np.broadcast_to(np.asarray(value, np.uint32), self.threads) for name, value in values.items()}


@dataclass(frozen=True)
class Active:
    """The threads that execute an instruction."""

    instruction: Instruction
    launch: Launch
    mask: Mask
    """Over all threads of the launch."""
    phases: Indices
    """Barriers that each thread has passed."""

    @cached_property
    def threads(self) -> Indices:
        """Numbers of the threads."""
        return np.flatnonzero(self.mask)

    def require(self, passed: Mask, error: type[PtxError], reason: Callable[[int], str] | str) -> None:
        """Raise ``error`` for the first of :attr:`threads` that has not ``passed`` (one value each).

        ``reason`` may be a function of the position in ``passed``.
        """
        if passed.all():
            return
        position = int(np.argmin(passed))
        block, thread = divmod(int(self.threads[position]), self.launch.block)
        x, y, _ = self.launch.grid
        place = f"block ({block % x}, {block // x % y}, {block // (x * y)}), thread {thread}"
        text = reason if isinstance(reason, str) else reason(position)
        raise error(f"Line {self.instruction.line}, {self.instruction.text!r}, {place}: {text}.")

    def refuse(self, error: type[PtxError], reason: str) -> NoReturn:
        """Raise ``error`` for the instruction, in any thread."""
        raise error(f"Line {self.instruction.line}, {self.instruction.text!r}: {reason}.")
