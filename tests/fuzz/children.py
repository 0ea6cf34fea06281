"""Run mutants in forked processes. A crash, a hang or a memory leak affects only the verdict of its mutant.

The parent imports everything before it forks, and makes no session of ONNX Runtime: a fork would lose its threads.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import re
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from fuzz.judge import Captured, Judge, Kind, Verdict

LARGEST = 2 << 30
"""Resident bytes above which a child is killed."""
GRACE = 20.0
"""Seconds beyond a kind's limit after which a child is killed."""
START = 10.0
"""Factor on the time limit of a process's first run, which loads code."""
POLL_SECONDS = 0.1
"""Seconds between two checks of the children."""


@dataclasses.dataclass
class Batch:
    """Seeds of one kind for one process. None: the unchanged input."""

    kind: str
    seeds: list[int | None]
    patience: float = 1
    """See :meth:`Judge.judge`."""


@dataclasses.dataclass
class _Child:
    batch: Batch
    pid: int
    pipe: int
    folder: Path
    current: int | None = None
    since: float = 0.0
    received: bytes = b""
    done: int = 0
    killed: str = ""


class Children:
    """Runs batches in at most ``jobs`` processes at a time."""

    def __init__(self, kinds: Mapping[str, Kind], jobs: int, scratch: Path, keep: Path | None = None) -> None:
        """``keep`` is a folder for the files of the only mutant."""
        self._kinds = kinds
        self._jobs = jobs
        self._scratch = scratch
        self._keep = keep

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[str, Verdict]]:
        """Yield each mutant's kind and verdict. A free process takes the next of ``batches``."""
        source, waiting = iter(batches), deque[Batch]()
        running: dict[int, _Child] = {}
        with selectors.DefaultSelector() as selector:
            try:
                while True:
                    while len(running) < self._jobs and (batch := waiting.popleft() if waiting else next(source, None)):
                        child = self._fork(batch)
                        running[child.pipe] = child
                        selector.register(child.pipe, selectors.EVENT_READ)
                    if not running:
                        return
                    for key, _ in selector.select(POLL_SECONDS):
                        child = running[key.fd]
                        content = os.read(key.fd, 1 << 16)
                        yield from self._take(child, content)
                        if not content:
                            selector.unregister(key.fd)
                            del running[key.fd]
                            yield from self._ended(child, waiting)
                    for child in running.values():
                        self._watch(child)
            finally:
                for child in running.values():
                    os.kill(child.pid, signal.SIGKILL)
                    os.waitpid(child.pid, 0)
                    os.close(child.pipe)
                    shutil.rmtree(child.folder, ignore_errors=True)

    def _fork(self, batch: Batch) -> _Child:
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _work(self._kinds[batch.kind], batch, folder, writer, self._keep is not None)
        os.close(writer)
        return _Child(batch, pid, reader, folder, since=time.monotonic())

    def _take(self, child: _Child, content: bytes) -> Iterator[tuple[str, Verdict]]:
        *lines, child.received = (child.received + content).split(b"\n")
        for line in lines:
            data = json.loads(line)
            child.since = time.monotonic()
            if "began" in data:
                child.current = data["began"]
            else:
                child.done += 1
                yield child.batch.kind, Verdict(**{**data, "changes": tuple(data["changes"])})

    def _ended(self, child: _Child, waiting: deque[Batch]) -> Iterator[tuple[str, Verdict]]:
        """Yield the verdict of the mutant that ended its process, if any. Another process continues its batch."""
        os.close(child.pipe)
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        rest = child.batch.seeds[child.done :]
        if rest:
            trace = _read(child.folder / "trace")
            changes = tuple(_read(child.folder / "changes").splitlines())
            failure = child.killed or ("hang" if "Timeout" in trace else "abort")
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            place = f"{'' if failure == 'hang' else how} {_frame(trace)}".strip()
            detail = f"{how}\n{trace}{_read(child.folder / 'stderr')[-2000:]}"
            yield child.batch.kind, Verdict(rest[0] or 0, changes, failure, detail, place)
            if rest[1:]:
                waiting.append(dataclasses.replace(child.batch, seeds=rest[1:]))
        if self._keep is not None and (child.folder / "mutant").is_dir():
            shutil.copytree(child.folder / "mutant", self._keep, symlinks=True)
        shutil.rmtree(child.folder, ignore_errors=True)

    def _watch(self, child: _Child) -> None:
        """Kill a child that is too large or does not end."""
        if _resident(child.pid) > LARGEST:
            child.killed = "memory"
        elif time.monotonic() - child.since > self._kinds[child.batch.kind].seconds * child.batch.patience + GRACE:
            child.killed = "hang"
        if child.killed:
            os.kill(child.pid, signal.SIGKILL)


def _work(kind: Kind, batch: Batch, folder: Path, pipe: int, keep: bool) -> NoReturn:
    """Run a child: judge its mutants, report each verdict, and exit without the parent's cleanup."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
        errors = open(folder / "stderr", "w+b")  # noqa: SIM115 (until the process ends)
        trace = open(folder / "trace", "w+", encoding="utf-8")  # noqa: SIM115
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor, target in ((0, nothing), (1, nothing), (2, errors.fileno())):
            os.dup2(target, descriptor)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        faulthandler.enable(trace)
        judge = Judge(kind, batch.kind, folder, Captured(errors), trace)
        if None not in batch.seeds:
            judge.judge(None, START)  # loads code: its cost must not count for a mutant
        for seed in batch.seeds:
            _send(pipe, {"began": seed})
            _send(pipe, dataclasses.asdict(judge.judge(seed, batch.patience, keep)))
        code = 0
    except BaseException:
        import traceback

        with open(folder / "trace", "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def _send(pipe: int, data: object) -> None:
    content = json.dumps(data).encode() + b"\n"
    while content:
        content = content[os.write(pipe, content) :]


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _frame(trace: str) -> str:
    """Return the innermost Python frame of a dump, or the last line of a traceback."""
    match = re.search(r'most recent call first\):?\n\s*File "([^"]*)", line \d+ in (\S+)', trace)
    if match:
        return f"{'/'.join(Path(match[1]).parts[-2:])}:{match[2]}"
    return trace.strip().splitlines()[-1][:100] if trace.strip() else ""
