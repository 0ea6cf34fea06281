"""Steps in processes of their own: each way to end is a result, and no process survives."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from support.paths import TESTS

from fusion_edge.benchmarks.acceptance import runner
from fusion_edge.benchmarks.acceptance.runner import run_step, run_steps
from fusion_edge.benchmarks.acceptance.steps import FAIL, PASS, SKIPPED, Step, StepResult, Workspace


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    return Workspace(tmp_path / "output", tmp_path / "scratch", None, None)


def step(function: str, *needs: str, limit: float = 60, **arguments: Any) -> Step:
    return Step(function, "part", f"support.acceptance_steps:{function}", arguments, needs, limit)


def log_of(workspace: Workspace, result: StepResult) -> str:
    assert result.log is not None
    return (workspace.output / result.log).read_text()


def test_a_step_passes(workspace: Workspace) -> None:
    result = run_step(step("passing", value=3), workspace)
    assert (result.name, result.part, result.status, result.summary) == ("passing", "part", PASS, "value 3")
    assert result.figures == {"value": 3, "output": "output", "bundle": True}
    assert result.seconds > 0
    assert 10e6 < result.peak_memory < 1e9
    assert sorted(log_of(workspace, result).splitlines()) == ["and warned", "printed"]


@pytest.mark.parametrize(
    ("function", "status", "summary"),
    [
        ("skipping", SKIPPED, "There is no GPU."),
        ("refusing", FAIL, "The kernel is wrong; expected 1."),
        ("raising", FAIL, "KeyError: 'layers'"),
        ("aborting", FAIL, "The process ended with SIGABRT; see aborting.log."),
        ("killed", FAIL, "The process ended with SIGKILL, as when memory runs out (dmesg says so); see killed.log."),
        ("leaving", FAIL, "The process ended without a result; see leaving.log."),
        ("unwritable", FAIL, "The process ended with exit code 1; see unwritable.log."),
        (
            "aborting_at_exit",
            FAIL,
            "It came to PASS (done), then ended with SIGABRT; see aborting_at_exit.log.",
        ),
    ],
)
def test_every_end_is_a_result(workspace: Workspace, function: str, status: str, summary: str) -> None:
    result = run_step(step(function), workspace)
    assert (result.status, result.summary) == (status, summary)


@pytest.mark.parametrize("function", ["refusing", "raising", "aborting"])
def test_the_log_has_the_place_of_a_failure(workspace: Workspace, function: str) -> None:
    """Of a crash, faulthandler writes it."""
    result = run_step(step(function), workspace)
    assert "acceptance_steps.py" in log_of(workspace, result)


def test_a_module_that_does_not_import_is_a_result(workspace: Workspace) -> None:
    result = run_step(Step("missing", "part", "support.no_such_module:run"), workspace)
    assert (result.status, result.summary) == (FAIL, "ModuleNotFoundError: No module named 'support.no_such_module'")


def test_a_step_that_hangs_is_killed_with_its_children(workspace: Workspace) -> None:
    started = time.monotonic()
    result = run_step(step("hanging", limit=5), workspace)
    assert (result.status, result.summary) == (FAIL, "It ran longer than 5 s and was killed.")
    assert 5 <= time.monotonic() - started < 30
    assert is_gone(int((workspace.scratch / "child").read_text()))


@pytest.mark.parametrize(("function", "status"), [("aborting_with_a_child", FAIL), ("passing_with_a_child", PASS)])
def test_no_child_outlives_a_step(workspace: Workspace, function: str, status: str) -> None:
    assert run_step(step(function), workspace).status == status
    assert is_gone(int((workspace.scratch / "child").read_text()))


def is_gone(process: int) -> bool:
    """Whether a process ends within ten seconds, or is a zombie that nobody awaits."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_an_interrupt_kills_the_step(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(process: Any, limit: float) -> int:
        monkeypatch.undo()
        while not (workspace.scratch / "child").is_file():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.subprocess.Popen, "wait", interrupted)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run_step(step("hanging"), workspace)
    assert is_gone(int((workspace.scratch / "child").read_text()))


def test_steps_run_in_order_and_need_others(workspace: Workspace) -> None:
    plan = [
        step("passing", value=1),
        step("refusing", "passing"),
        step("raising", "passing", "refusing"),  # not run
        step("skipping", "not-in-this-run"),
        step("leaving", "skipping", "raising"),
    ]
    results = list(run_steps(plan, workspace))
    assert [(result.name, result.status) for result in results] == [
        ("passing", PASS),
        ("refusing", FAIL),
        ("raising", SKIPPED),
        ("skipping", SKIPPED),
        ("leaving", SKIPPED),
    ]
    assert results[2].summary == "It needs refusing, which did not pass."
    assert results[4].summary == "It needs skipping, raising, which did not pass."
    assert results[2].log is None
    assert not (workspace.output / "raising.log").exists()
