"""Run one mutant and judge it: allowed and forbidden reactions to an invalid input."""

from __future__ import annotations

import contextlib
import faulthandler
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, Protocol

from fusion_edge.runtime.errors import FusionError

SECONDS = 2.0
"""Time limit of a run. Longer is a hang."""
GROWTH = 64 << 20
"""Limit of a run's growth of resident memory, in bytes."""
HERE = Path(__file__).parent
OUTPUT = "output"
"""Folder that a run may write its results to, and nothing else."""


@dataclass(frozen=True)
class Mutant:
    """Changes to an input, and the call that reads it: returns an exit code, or None if it is not a command."""

    changes: tuple[str, ...]
    run: Callable[[], int | None]
    results: frozenset[str] = frozenset()
    """Names that a successful run may leave in the output folder."""


class Kind(Protocol):
    """A kind of input."""

    share: int
    """Relative share of a campaign's mutants. 0: only on request."""
    batch: int
    """Mutants per process."""
    seconds: float
    growth: int

    def prepare(self, folder: Path) -> None:
        """Write the unchanged inputs into a new folder, once, before any process is forked."""

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        """Return a random mutant with its files in ``folder``. ``draw=None``: the unchanged input."""
        ...


@dataclass(frozen=True)
class Verdict:
    """Result of one mutant."""

    seed: int
    changes: tuple[str, ...] = ()
    failure: str = ""
    """exception, abort, hang, memory, stderr, files or exit code. Empty: correct."""
    detail: str = ""
    """Traceback, or what was written."""
    place: str = ""
    """Source of the failure. Failures of the same kind and place count as one."""
    written: str = ""
    """Text on standard error."""
    accepted: bool = False
    seconds: float = 0.0
    growth: int = 0


@dataclass
class Captured:
    """Standard error of this process, redirected to a file."""

    file: IO[bytes]

    def take(self) -> str:
        """Return what was written since the last call."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.file.seek(0)
        text = self.file.read().decode("utf-8", "replace")
        self.file.seek(0)
        self.file.truncate()
        return text


@dataclass
class Judge:
    """Runs mutants in this process, a child that may crash."""

    kind: Kind
    name: str
    folder: Path
    """New folder of this process."""
    errors: Captured
    trace: IO[str]
    """File for the stack of a run that takes too long."""
    temporary: Path = field(init=False)

    def __post_init__(self) -> None:
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        tempfile.tempdir = str(self.temporary)

    def judge(self, seed: int | None, patience: float = 1, keep: bool = False) -> Verdict:
        """Run the mutant of a seed, or the unchanged input for None.

        This process ends after ``patience`` times the time limit of a mutant, by the clock. Until then, the time spent
        waiting for a processor does not count.
        """
        folder = self.folder / "mutant"
        (folder / OUTPUT).mkdir(parents=True)
        draw = None if seed is None else Random(f"{self.name}:{seed}")
        mutant = self.kind.mutant(draw, folder)
        (self.folder / "changes").write_text("\n".join(mutant.changes), encoding="utf-8", errors="replace")
        self.errors.take()
        base = _reset_peak()
        started = _busy_seconds()
        faulthandler.dump_traceback_later(self.kind.seconds * patience, exit=True, file=self.trace)
        code, failure, detail, place = _run(mutant.run)
        faulthandler.cancel_dump_traceback_later()
        seconds, growth = _busy_seconds() - started, _peak() - base
        written = self.errors.take()
        if not failure:
            failure, detail = _check_output(code, written)
            place = _without_details(detail)
        if not failure and seconds > self.kind.seconds:
            failure, detail = "hang", f"{seconds:.1f} s"
            place = re.sub(r"[\d=].*", "", " ".join(mutant.changes))
        if not failure and growth > self.kind.growth:
            failure, detail = "memory", f"{growth >> 20} MB more than before"
            place = re.sub(r"[\d=].*", "", " ".join(mutant.changes))
        left = _leftover_names(folder / OUTPUT, self.temporary, mutant.results if code == 0 else frozenset())
        if not failure and left:
            failure, detail, place = "files", f"left behind: {', '.join(left)}", _without_details(left[0])
        if not keep:
            shutil.rmtree(folder)
        for path in self.temporary.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        accepted = not failure and code == 0
        result = failure, detail, place, written[-2000:]
        return Verdict(seed or 0, mutant.changes, *result, accepted, round(seconds, 4), growth)


def _run(call: Callable[[], int | None]) -> tuple[int, str, str, str]:
    """Return exit code, failure, detail and place of a call. A FusionError is exit code 1."""
    try:
        with warnings.catch_warnings():  # show a repeated warning again
            return call() or 0, "", "", ""
    except FusionError as error:  # reported as the commands do
        sys.stderr.write(f"error: {error}\n")
        return 1, "", "", ""
    except SystemExit as stop:  # argparse
        return (stop.code if isinstance(stop.code, int) else 1), "", "", ""
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent != HERE]
        last = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].name}" if frames else ""
        return 1, "exception", traceback.format_exc(), f"{type(error).__name__} {last}: {_without_details(str(error))}"


def _check_output(code: int, written: str) -> tuple[str, str]:
    """Return failure and detail, by the exit code and standard error."""
    lines = written.splitlines()
    if code == 0:
        strange = [line for line in lines if not line.startswith(("warning: running on ", "note: MatMul and "))]
        return ("stderr", "\n".join(strange)) if strange else ("", "")
    if code not in (1, 2):
        return "exit code", f"exit code {code}: {written}"
    if len(lines) > 1 and lines[0].startswith("usage: ") and ": error: " in lines[-1]:
        return "", ""
    if len(lines) != 1 or not re.match("error: .", lines[0]):
        return "stderr", "\n".join([line for line in lines if not line.startswith("error: ")] or lines)
    return "", ""


def _without_details(text: str) -> str:
    """Return a message without the parts that differ between mutants."""
    first = (text.strip().splitlines() or [""])[0]
    return re.sub(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d+|/\S+|tmp\w+", "_", first)[:120]


def _leftover_names(output: Path, temporary: Path, allowed: frozenset[str]) -> list[str]:
    found = [path.name for path in output.iterdir() if path.name not in allowed]
    return found + [f"a temporary file {path.name}" for path in temporary.iterdir()]


def _busy_seconds() -> float:
    """Return seconds of a clock that stops while this thread waits for a processor."""
    with open("/proc/thread-self/schedstat", encoding="ascii") as file:
        waited = int(file.read().split()[1])
    return time.perf_counter() - waited / 1e9


def _reset_peak() -> int:
    """Return the resident bytes, and reset the peak to them."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) << 10
    return 0
