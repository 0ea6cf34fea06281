"""Run steps one after another, each in a process of its own: a crash, a hang and an abort are results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from fusion_edge.benchmarks.acceptance.steps import FAIL, PASS, SKIPPED, Step, StepResult, Workspace
from fusion_edge.benchmarks.acceptance.worker import task_text

WORKER = "fusion_edge.benchmarks.acceptance.worker"
KILLED = -signal.SIGKILL


def run_steps(steps: Iterable[Step], workspace: Workspace) -> Iterator[StepResult]:
    """Yield the result of each step as it ends. A step is skipped if one that it needs has not passed."""
    ended: dict[str, str] = {}
    for step in steps:
        missing = [name for name in step.needs if ended.get(name, PASS) != PASS]
        if missing:
            reason = f"It needs {', '.join(missing)}, which did not pass."
            result = StepResult(step.name, step.part, SKIPPED, reason, 0, 0, {}, None)
        else:
            result = run_step(step, workspace)
        ended[step.name] = result.status
        yield result


def log_name(step: Step) -> str:
    """Return the name of a step's log."""
    return f"{step.name}.log"


def run_step(step: Step, workspace: Workspace) -> StepResult:
    """Run a step. Its standard output and error go to a log in the workspace."""
    task, written = (workspace.scratch / f"{step.name}.{kind}.json" for kind in ("task", "result"))
    task.write_text(task_text(step, workspace), encoding="utf-8")
    log = log_name(step)
    started = time.monotonic()
    with (workspace.output / log).open("wb") as output:
        command = [sys.executable, "-X", "faulthandler", "-m", WORKER, str(task), str(written)]
        code = _wait(command, output, step.limit)
    seconds = time.monotonic() - started
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    status, summary = found.get("status", FAIL), found.get("summary", "")
    if code is None:
        status, summary = FAIL, f"It ran longer than {step.limit:g} s and was killed."
    elif code != 0:
        before = f"It came to {status} ({summary}), then" if found else "The process"
        status, summary = FAIL, f"{before} ended with {_ending(code)}; see {log}."
    elif not found:
        status, summary = FAIL, f"The process ended without a result; see {log}."
    peak = found.get("peak_memory", 0)
    return StepResult(step.name, step.part, status, summary, seconds, peak, found.get("figures", {}), log)


def _wait(command: list[str], output: Any, limit: float) -> int | None:
    """Return a command's exit code; None if it ran longer than ``limit`` seconds. No process of it survives."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # the step has left no process
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(code: int) -> str:
    if code == KILLED:
        return "SIGKILL, as when memory runs out (dmesg says so)"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
