"""Kinds that other helpers of the tests carry out: calls of the kernels, and faults in system calls of an export."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz.judge import GROWTH, Mutant


@dataclass
class External:
    """See :class:`fuzz.judge.Kind`. ``module.run(number, count)`` tries some numbers and lists what failed."""

    module: str
    calls: int
    """Tried at a time: one mutant."""
    seconds: float
    share: int = 0
    batch: int = 1
    growth: int = GROWTH
    _run: Callable[[int, int], list[str]] = field(init=False)

    def prepare(self, folder: Path) -> None:
        self._run = importlib.import_module(self.module).run

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        first = 0 if draw is None else draw.randrange(2**40)

        def run() -> None:
            failures = self._run(first, self.calls)
            assert not failures, "\n".join(failures)

        return Mutant((f"numbers {first} to {first + self.calls - 1} of {self.module}",), run)
