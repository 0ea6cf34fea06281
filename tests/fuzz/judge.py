"""One mutant and its verdict: what a command or call may do with a wrong input, and what it must not."""

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
"""Longer is a hang."""
GROWTH = 64 << 20
"""More bytes of resident memory is too much."""
HERE = Path(__file__).parent
OUTPUT = "output"
"""Folder that a run may write in: its results, nothing else."""


@dataclass(frozen=True)
class Mutant:
    """What was changed, and the call that reads it: it returns an exit code, or None where it is no command."""

    changes: tuple[str, ...]
    run: Callable[[], int | None]
    results: frozenset[str] = frozenset()
    """Names in the output folder that a run which succeeds may leave there."""


class Kind(Protocol):
    """A kind of input."""

    share: int
    """Of a campaign's mutants, beside the other kinds' shares; 0: only where it is asked for."""
    batch: int
    """Mutants of one process."""
    seconds: float
    growth: int

    def prepare(self, folder: Path) -> None:
        """Write what mutants are made of into a new folder, once, before any process is forked."""

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        """The mutant of a generator, its files in ``folder``; with None what it is made of, unchanged."""


@dataclass(frozen=True)
class Verdict:
    """What came of one mutant."""

    seed: int
    changes: tuple[str, ...] = ()
    failure: str = ""
    """exception, abort, hang, memory, stderr, files, exit code; empty: as it should be."""
    detail: str = ""
    """What failed: a traceback, or what was written."""
    place: str = ""
    """Failures of the same kind and place count as one."""
    written: str = ""
    """On standard error."""
    accepted: bool = False
    seconds: float = 0.0
    growth: int = 0


@dataclass
class Captured:
    """Standard error of this process, as a file."""

    file: IO[bytes]

    def take(self) -> str:
        """What was written since the last time."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.file.seek(0)
        text = self.file.read().decode("utf-8", "replace")
        self.file.seek(0)
        self.file.truncate()
        return text


@dataclass
class Judge:
    """Runs mutants in this process, a child that may die of it."""

    kind: Kind
    name: str
    folder: Path
    """This process's own, new."""
    errors: Captured
    trace: IO[str]
    """Where the stack is written if a run takes too long."""
    temporary: Path = field(init=False)

    def __post_init__(self) -> None:
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        tempfile.tempdir = str(self.temporary)

    def judge(self, seed: int | None, patience: float = 1, keep: bool = False) -> Verdict:
        """Run the mutant of a seed, or the unchanged input for None.

        This process ends after ``patience`` times the seconds that a mutant has, by the clock; until then the time
        counts in which it did not wait for a processor.
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
            failure, detail = _told(code, written)
            place = _general(detail)
        if not failure and seconds > self.kind.seconds:
            failure, detail = "hang", f"{seconds:.1f} s"
            place = re.sub(r"[\d=].*", "", " ".join(mutant.changes))
        if not failure and growth > self.kind.growth:
            failure, detail = "memory", f"{growth >> 20} MB more than before"
            place = re.sub(r"[\d=].*", "", " ".join(mutant.changes))
        left = _left(folder / OUTPUT, self.temporary, mutant.results if code == 0 else frozenset())
        if not failure and left:
            failure, detail, place = "files", f"left behind: {', '.join(left)}", _general(left[0])
        if not keep:
            shutil.rmtree(folder)
        for path in self.temporary.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        accepted = not failure and code == 0
        told = failure, detail, place, written[-2000:]
        return Verdict(seed or 0, mutant.changes, *told, accepted, round(seconds, 4), growth)


def _run(call: Callable[[], int | None]) -> tuple[int, str, str, str]:
    """Exit code, failure, detail and place of a call; 1 for an error of ours."""
    try:
        with warnings.catch_warnings():  # each mutant's are shown, whatever was shown before
            return call() or 0, "", "", ""
    except FusionError as error:  # told as the commands tell it
        sys.stderr.write(f"error: {error}\n")
        return 1, "", "", ""
    except SystemExit as stop:  # argparse
        return (stop.code if isinstance(stop.code, int) else 1), "", "", ""
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent != HERE]
        last = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].name}" if frames else ""
        return 1, "exception", traceback.format_exc(), f"{type(error).__name__} {last}: {_general(str(error))}"


def _told(code: int, written: str) -> tuple[str, str]:
    """Failure and detail by the exit code and what is on standard error."""
    lines = written.splitlines()
    if code == 0:
        strange = [line for line in lines if not line.startswith("warning: running on ")]
        return ("stderr", "\n".join(strange)) if strange else ("", "")
    if code not in (1, 2):
        return "exit code", f"exit code {code}: {written}"
    if len(lines) > 1 and lines[0].startswith("usage: ") and ": error: " in lines[-1]:
        return "", ""
    if len(lines) != 1 or not re.match("error: .", lines[0]):
        return "stderr", "\n".join([line for line in lines if not line.startswith("error: ")] or lines)
    return "", ""


def _general(text: str) -> str:
    """A message without what differs from one mutant to the next."""
    first = (text.strip().splitlines() or [""])[0]
    return re.sub(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d+|/\S+|tmp\w+", "_", first)[:120]


def _left(output: Path, temporary: Path, allowed: frozenset[str]) -> list[str]:
    found = [path.name for path in output.iterdir() if path.name not in allowed]
    return found + [f"a temporary file {path.name}" for path in temporary.iterdir()]


def _busy_seconds() -> float:
    """A clock that stands still while this thread could run, but others have the processors."""
    with open("/proc/thread-self/schedstat", encoding="ascii") as file:
        waited = int(file.read().split()[1])
    return time.perf_counter() - waited / 1e9


def _reset_peak() -> int:
    """Resident bytes now, from which the peak is counted again."""
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
