"""Inject faults into the system calls of an export that replaces a bundle: kills, signals, failing and short writes.

    python tests/faults.py --kills 200 --writes 200

:func:`inject` injects a fault in a forked child and checks the files afterwards. :func:`trace` lists the calls.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from support.checkpoints import TINY, write_checkpoint

from fusion_edge.export import cli
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import open_bundle, verify
from fusion_edge.runtime.errors import FusionError

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
ERRORS = ("ENOSPC", "EIO", "EDQUOT")
SHORT = "short write"
KINDS = (*SIGNALS, *ERRORS, SHORT)
CALLS = (
    "open", "mkdir", "posix_fallocate", "pwrite", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir"
)  # fmt: skip
"""Functions of ``os`` through which an export changes folders and files."""
OLD, NEW, NEXT = "int8", "int4", "fp16"
"""Precisions of the replaced bundle, the new one, and the one written afterwards."""


@dataclass(frozen=True)
class Place:
    """Checkpoint and folders of an injection."""

    checkpoint: Path
    replaced: Path
    """Bundle of precision :data:`OLD` to copy into place."""
    work: Path
    """Folder for the copy. Its content is deleted."""
    is_mounted: bool = False
    """Whether the output behaves as a mount point."""
    has_exchange: bool = True
    """Whether folders can be swapped atomically."""

    @property
    def output(self) -> Path:
        """Path of the bundle."""
        return self.work / "place" / "bundle"

    def reset(self) -> None:
        """Restore the old bundle, and delete everything beside it."""
        shutil.rmtree(self.output.parent, ignore_errors=True)
        shutil.copytree(self.replaced, self.output)


PLACES = {"a folder": (False, True), "a folder without exchange": (False, False), "a mount point": (True, False)}
"""``is_mounted`` and ``has_exchange`` of :class:`Place` by name."""


@dataclass
class Calls:
    """Wraps the functions of :data:`CALLS`, and records their calls inside a folder."""

    folder: Path
    act: Callable[[int, str, Callable[..., Any], Sequence[Any], dict[str, Any]], Any]
    names: list[str] = field(default_factory=list)
    _descriptors: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def patched(self) -> mock._patch_dict:
        """Return a context that records calls."""
        return mock.patch.dict(os.__dict__, {name: self._counted(name, getattr(os, name)) for name in CALLS})

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._is_inside(arguments[0], options):
                return original(*arguments, **options)
            with self._lock:
                number = len(self.names)
                self.names.append(name)
                if name == "close":
                    self._descriptors.discard(arguments[0])
            result = self.act(number, name, original, arguments, options)
            if name == "open":
                self._descriptors.add(result)
            return result

        return call

    def _is_inside(self, place: Any, options: dict[str, Any]) -> bool:
        if isinstance(place, int):
            return place in self._descriptors
        directory = options.get("dir_fd", options.get("src_dir_fd"))
        return directory in self._descriptors if directory is not None else self.folder in Path(place).parents


def trace(place: Place) -> list[str]:
    """Return the calls of an export without faults, in order."""
    place.reset()
    calls = Calls(place.output.parent, lambda _number, _name, original, given, options: original(*given, **options))
    code, said = _in_child(place, calls, ["--force", f"--{NEW}"], lambda: "\n".join(calls.names))
    assert code == 0, said
    return said.splitlines()


def inject(kind: str, number: int, place: Place) -> str:
    """Inject one of :data:`KINDS` at call ``number`` of an export. Return the error that it causes, or ``""``."""

    def act(at: int, name: str, original: Callable[..., Any], given: Sequence[Any], options: dict[str, Any]) -> Any:
        if at != number:
            return original(*given, **options)
        if kind in SIGNALS:
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == SHORT and name in ("pwrite", "write"):
            return original(given[0], memoryview(given[1])[: max(1, len(given[1]) // 2)], *given[2:])
        elif kind in ERRORS:
            if name == "close":  # close() closes even if it fails
                original(*given)
            raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
        return original(*given, **options)

    place.reset()
    code, said = _in_child(place, Calls(place.output.parent, act), ["--force", f"--{NEW}"])
    return _check_outcome(kind, code, said, place) or _check_next_exports(place)


def _in_child(
    place: Place, calls: Calls, options: list[str], report: Callable[[], str] | None = None
) -> tuple[int, str]:
    """Run an export in a forked child. Return its exit code (negative: the signal that killed it) and its output."""
    said = place.work / "said"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)  # noqa: SIM115
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with calls.patched(), _simulated(place):
                code = cli.main([str(place.checkpoint), "-o", str(place.output), *options])
            if report is not None:
                sys.stderr.write(report())
            sys.stderr.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8")


@contextmanager
def _simulated(place: Place) -> Iterator[None]:
    """Simulate the place's file system."""
    ismount = os.path.ismount
    mounted = {place.output} if place.is_mounted else set()
    with ExitStack() as stack:
        stack.enter_context(mock.patch("os.path.ismount", lambda folder: folder in mounted or ismount(folder)))
        if not place.has_exchange:
            stack.enter_context(mock.patch("fusion_edge.export.bundle.atomic_folder.exchange", return_value=False))
        yield


def _check_outcome(kind: str, code: int, said: str, place: Place) -> str:
    """Return the error in how the export ended, or ``""``."""
    expected = {0}
    if kind in SIGNALS:
        number = int(getattr(signal, kind))
        expected.add(-number if kind == "SIGKILL" else 128 + number)
    elif kind in ERRORS:
        expected.add(1)
    if code not in expected:
        return f"exit code {code}: {said[-300:]}"
    if said.count("\n") > 1 or "Traceback" in said:
        return f"said {said[-500:]!r}"
    if kind == "SIGKILL" and (place.is_mounted or not place.has_exchange):
        return ""
    try:
        precision = verified_precision(place.output)
    except FusionError as error:
        # A move into a mount point may be incomplete: the next export finishes it.
        is_kept = place.is_mounted and kind in ERRORS and (place.output / ".bundle.partial").exists()
        return "" if is_kept else f"no bundle after exit code {code}: {error}"
    if code == 0 and precision != NEW:
        return "success without the new bundle"
    left = sorted(path.name for path in place.output.parent.iterdir())
    return "" if kind in ("SIGKILL", *ERRORS) or left == ["bundle"] else f"left {left}"


def _check_next_exports(place: Place) -> str:
    """Return the error after two more exports, or ``""``: a refused one, which recovers, and a complete one."""
    nothing = Calls(place.output.parent, lambda _number, _name, original, given, options: original(*given, **options))
    for options, code, precisions in (([], 1, (OLD, NEW)), (["--force", f"--{NEXT}"], 0, (NEXT,))):
        ended, said = _in_child(place, nothing, options)
        if ended != code:
            return f"the next export with {options} ended with {ended}: {said[-300:]}"
        try:
            if verified_precision(place.output) not in precisions:
                return f"after an export with {options}: {verified_precision(place.output)}"
        except FusionError as error:
            return f"after an export with {options}: {error}"
        left = sorted(path.name for path in place.output.parent.iterdir())
        if left != ["bundle"]:
            return f"after an export with {options}: {left}"
    return ""


def verified_precision(folder: Path) -> str:
    """Return the precision of a bundle after checking all its files. Raises :class:`FusionError`."""
    opened = open_bundle(folder)
    verify(opened)
    expected = {MANIFEST, *(entry.path for entry in opened.manifest.files)}
    if (found := {path.name for path in folder.iterdir()}) != expected:
        raise FusionError(f"{folder} and its manifest differ in {sorted(found ^ expected)}.")
    return opened.manifest.precision


def main() -> int:
    """Inject random faults. Return 1 if a bundle was damaged or lost, or a file was left behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="number of kills; half of them are other signals")
    parser.add_argument("--writes", type=int, default=200, help="number of failing or short calls")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = write_checkpoint(work / "FUSION-tiny", TINY)
        if cli.main([str(checkpoint), "-o", str(work / "old"), f"--{OLD}", "--json"]) != 0:
            return 1
        places = [Place(checkpoint, work / "old", work, *which) for which in PLACES.values()]
        traces = [trace(place) for place in places]
        kills = [draw.choice(("SIGKILL", draw.choice(SIGNALS[1:]))) for _ in range(asked.kills)]
        for kind in (*kills, *(draw.choice((*ERRORS, SHORT)) for _ in range(asked.writes))):
            which = draw.randrange(len(places))
            name = draw.choice(sorted(set(traces[which])))  # evenly by function: most calls are pwrite
            number = draw.choice([i for i, one in enumerate(traces[which]) if one == name])
            wrong = inject(kind, number, places[which])
            outcomes["wrong" if wrong else "right"] += 1
            if wrong:
                print(f"{kind} at call {number} ({name}), {[*PLACES][which]}: {wrong}", flush=True)
    print(f"{asked.kills} kills and signals, {asked.writes} faults of writes: {outcomes['wrong']} wrong")
    return 1 if outcomes["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
