"""Steps that end in every way, for ``tests/benchmarks/acceptance/test_runner.py``."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time

from fusion_edge.benchmarks.acceptance.steps import Outcome, SkippedStep, Workspace
from fusion_edge.runtime.errors import FusionError


def passing(workspace: Workspace, value: int) -> Outcome:
    sys.stdout.write("printed\n")
    sys.stderr.write("and warned\n")
    return Outcome(
        f"value {value}", {"value": value, "output": workspace.output.name, "bundle": workspace.bundle is None}
    )


def skipping(workspace: Workspace) -> Outcome:
    raise SkippedStep("There is no GPU.")


def refusing(workspace: Workspace) -> Outcome:
    raise FusionError("The kernel is wrong; expected 1.")


def raising(workspace: Workspace) -> Outcome:
    raise KeyError("layers")


def aborting(workspace: Workspace) -> Outcome:
    os.abort()


def leaving(workspace: Workspace) -> Outcome:
    os._exit(0)


def aborting_at_exit(workspace: Workspace) -> Outcome:
    atexit.register(os.abort)
    return Outcome("done")


def _start_child(workspace: Workspace) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (workspace.scratch / "child").write_text(str(child.pid))


def aborting_with_a_child(workspace: Workspace) -> Outcome:
    _start_child(workspace)
    os.abort()


def passing_with_a_child(workspace: Workspace) -> Outcome:
    _start_child(workspace)
    return Outcome("done")


def hanging(workspace: Workspace) -> Outcome:
    _start_child(workspace)
    time.sleep(60)
    return Outcome("late")


def killed(workspace: Workspace) -> Outcome:
    os.kill(os.getpid(), 9)
    return Outcome("never")


def unwritable(workspace: Workspace) -> Outcome:
    return Outcome("figures that are no JSON", {"object": object()})
