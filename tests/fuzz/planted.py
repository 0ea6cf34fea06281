"""Planted faults of every kind, which the campaign must find."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from fusion_edge.runtime import FusionError, UsageError
from fuzz.judge import GROWTH, OUTPUT, Mutant


class Planted:
    """See :class:`fuzz.judge.Kind`."""

    share = 0
    batch = 20
    seconds = 0.4
    growth = GROWTH

    def prepare(self, folder: Path) -> None:
        pass

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        name = "answers" if draw is None else draw.choice([*FAULTS, *RIGHT])
        run = RIGHT[name] if name in RIGHT else FAULTS[name][1]
        return Mutant((name,), lambda: run(folder / OUTPUT), frozenset({"bundle"}))


Run = Callable[[Path], int | None]


def _raises(_: Path) -> None:
    raise ValueError("a planted fault")


def _refuses(_: Path) -> None:
    raise UsageError("The question is empty; ask something about the image.")


def _writes_two_lines(_: Path) -> None:
    sys.stderr.write("A line before the error.\n")
    raise FusionError("The error.")


def _allocates(_: Path) -> None:
    _large = b"x" * (GROWTH + (8 << 20))


def _warns(_: Path) -> None:
    warnings.warn("Corrupt EXIF data", UserWarning, stacklevel=1)


def _writes_from_c(_: Path) -> None:
    os.write(2, b"TIFFReadDirectory: Warning\n")


def _leaves(output: Path) -> None:
    (output / ".bundle.partial").mkdir()


def _leaves_half_a_bundle(output: Path) -> int:
    (output / "bundle").mkdir()
    return _exit_with(1)


def _leaves_a_temporary_file(_: Path) -> None:
    tempfile.mkstemp()


def _exit_with(code: int) -> int:
    sys.stderr.write("error: The bundle is damaged; export it again.\n")
    return code


def _loops(_: Path) -> None:
    while True:
        pass


FAULTS: Mapping[str, tuple[str, Run]] = {
    "raises": ("exception", _raises),
    "sleeps": ("hang", lambda _: time.sleep(60)),
    "loops": ("hang", _loops),
    "allocates": ("memory", _allocates),
    "warns": ("stderr", _warns),
    "writes from C": ("stderr", _writes_from_c),
    "writes two lines": ("stderr", _writes_two_lines),
    "fails silently": ("stderr", lambda _: 1),
    "aborts": ("abort", lambda _: os.abort()),
    "reads address 0": ("abort", lambda _: len(ctypes.string_at(0))),
    "ends the process": ("abort", lambda _: os._exit(0)),
    "exit code": ("exit code", lambda _: _exit_with(3)),
    "leaves a folder": ("files", _leaves),
    "leaves half a bundle": ("files", _leaves_half_a_bundle),
    "leaves a temporary file": ("files", _leaves_a_temporary_file),
}
"""Expected failure and planted fault, by name."""

RIGHT: Mapping[str, Run] = {
    "answers": lambda _: 0,
    "refuses": _refuses,
    "refuses as a command": lambda _: _exit_with(1),
}
"""Correct behavior."""
