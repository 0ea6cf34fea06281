"""Kinds run by other test helpers: calls of the kernels, and faults in system calls of an export."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from random import Random

import faults
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.export import cli
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fuzz import kernels
from fuzz.judge import GROWTH, Mutant


@dataclass
class Kernels:
    """Kernel calls on memory between guard pages, ``calls`` per mutant. See :class:`fuzz.judge.Kind`."""

    calls: int = 100
    share: int = 0
    batch: int = 1
    seconds: float = 120.0
    growth: int = GROWTH

    def prepare(self, folder: Path) -> None:
        """Do nothing: calls are random."""

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        first = 0 if draw is None else draw.randrange(2**40)
        assert cpu_kernels.library() is not None, "the kernels are not built"
        tiers = cpu_kernels.tiers()
        tier = tiers[first % len(tiers)]

        def run() -> None:
            failures = kernels.run(first, self.calls, tier)
            assert not failures, "\n".join(failures)

        return Mutant((f"calls {first} to {first + self.calls - 1} on {tier}",), run)


@dataclass
class SystemCalls:
    """An export that replaces a bundle, with a fault at one of its system calls. See :class:`fuzz.judge.Kind`."""

    are_kills: bool
    """Whether faults are kills and signals, or failing and short writes."""
    share: int = 0
    batch: int = 20
    seconds: float = 60.0
    growth: int = GROWTH

    def prepare(self, folder: Path) -> None:
        checkpoint = write_checkpoint(folder / "checkpoint", TINY)
        with contextlib.redirect_stdout(None):
            if cli.main([str(checkpoint), "-o", str(folder / "old"), f"--{faults.OLD}"]):
                raise RuntimeError("The bundle that exports replace could not be written.")
        self._place = checkpoint, folder / "old"
        (folder / "work").mkdir()
        self._calls = {where: faults.trace(self._at(folder / "work", where)) for where in faults.PLACES}

    def _at(self, work: Path, where: str) -> faults.Place:
        return faults.Place(*self._place, work, *faults.PLACES[where])

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        if draw is None:
            place = self._at(folder, "a folder")
            return Mutant((), lambda: int(not faults.trace(place)))
        kills, writes = ["SIGKILL", draw.choice(faults.SIGNALS)], [*faults.ERRORS, faults.SHORT]
        fault, where = draw.choice(kills if self.are_kills else writes), draw.choice([*faults.PLACES])
        calls = self._calls[where]
        name = draw.choice(sorted(set(calls)))  # by name first: most calls are writes
        number = draw.choice([index for index, one in enumerate(calls) if one == name])
        place = self._at(folder, where)

        def run() -> None:
            wrong = faults.inject(fault, number, place)
            assert not wrong, wrong

        return Mutant((f"{fault} at call {number}, {name}, of an export to {where}",), run)
