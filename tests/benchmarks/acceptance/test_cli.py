"""The command: lines, result, archive, exit code. The plan, and that the door leads there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusion_edge.benchmarks.acceptance import cli, plan
from fusion_edge.benchmarks.acceptance.output_folder import RESULT, result_text
from fusion_edge.benchmarks.acceptance.steps import FAIL, PASS, SKIPPED, Step, StepResult, Workspace


def result(name: str, status: str) -> StepResult:
    return StepResult(name, "part", status, f"summary of {name}", 1.25, 1000, {"figure": 1}, f"{name}.log")


class Steps:
    """Stands in for the processes: each step writes a log, and ends as it is told."""

    def __init__(self, statuses: dict[str, str]) -> None:
        self.statuses = statuses
        self.workspaces: list[Workspace] = []

    def __call__(self, steps: list[Step], workspace: Workspace) -> Iterator[StepResult]:
        self.workspaces.append(workspace)
        for name, status in self.statuses.items():
            assert json.loads((workspace.output / RESULT).read_text())["steps"] is not None
            (workspace.output / f"{name}.log").write_text("log")
            (workspace.scratch / "large").touch()
            yield result(name, status)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``run(statuses, *arguments)`` runs the command with steps that end so; the output is ``tmp_path/"out"``."""

    def run(statuses: dict[str, str], *arguments: str) -> int:
        monkeypatch.setattr(cli, "run_steps", Steps(statuses))
        return cli.main(["--output", str(tmp_path / "out"), *arguments])

    return run


def test_a_run_without_a_failure(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "copy.json"
    assert run({"a": PASS, "b": SKIPPED}, "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["PASS", "a", "1.2", "s", "summary", "of", "a"]
    archive = tmp_path / "out.tar.gz"
    assert lines[2] == f"1 passed, 0 failed, 1 skipped. Send {archive} back: an issue of fusion-edge, or a mail."
    content = json.loads(file.read_text())
    assert content["counts"] == {PASS: 1, FAIL: 0, SKIPPED: 1}
    assert [(step["name"], step["status"], step["figures"]) for step in content["steps"]] == [
        ("a", PASS, {"figure": 1}),
        ("b", SKIPPED, {"figure": 1}),
    ]
    with tarfile.open(archive) as packed:
        assert sorted(packed.getnames()) == ["out", "out/a.log", "out/b.log", "out/result.json"]
        member = packed.extractfile("out/result.json")
        assert member is not None
        assert json.loads(member.read()) == content


def test_a_failure_is_exit_code_1(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run({"a": PASS, "b": FAIL, "c": PASS}) == 1
    assert "2 passed, 1 failed, 0 skipped" in capsys.readouterr().out


def test_a_later_run_replaces_an_earlier_one(run: Callable[..., int], tmp_path: Path) -> None:
    assert run({"demo-cpu": PASS}) == 0
    assert run({"environment": PASS}) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["environment.log", "result.json"]


def test_an_interrupted_run_keeps_what_it_has(run: Callable[..., int], tmp_path: Path) -> None:
    """The machine may stop in a step: the earlier ones are on the disk, and the next run takes the folder."""

    class Stopping(dict[str, str]):
        def items(self) -> Iterator[tuple[str, str]]:  # type: ignore[override]
            yield "environment", PASS
            raise KeyboardInterrupt

    assert run(Stopping()) == 130
    (step,) = json.loads((tmp_path / "out" / "result.json").read_text())["steps"]
    assert step["name"] == "environment"
    assert run({"environment": PASS}) == 0


def test_other_files_are_not_replaced(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert run({"environment": PASS}) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out is not a folder; choose another --output.\n"
    assert (tmp_path / "out").read_text() == "mine"


RESULT_TEXT = result_text([], 0)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"mine": ""}, "is not an earlier result of this command"),
        ({"result.json": "{}"}, "is not an earlier result of this command"),
        ({"result.json": '{"steps": []}', "model.bin": ""}, "is not an earlier result of this command"),
        ({"result.json": "no JSON"}, "is not an earlier result of this command"),
        ({"result.json": RESULT_TEXT, "environment.log": "", "dmesg.log": ""}, "holds dmesg.log, which this command"),
        ({"result.json": RESULT_TEXT, "folder/mine": ""}, "holds folder, which this command does not write"),
        ({"result.json": RESULT_TEXT, "environment.log/mine": ""}, "holds environment.log, which this command"),
    ],
)
def test_other_folders_are_not_replaced(
    files: dict[str, str],
    reason: str,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, content in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert run({"environment": PASS}) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.endswith("; choose another --output.\n")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files


def test_all_that_a_killed_run_leaves_is_replaced(run: Callable[..., int], tmp_path: Path) -> None:
    left = ("demo-cpu.log", "int4-64-1-rows.layers.json", ".result.json.0a1b", ".gemm.layers.json.0a1b")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (tmp_path / "out" / ".scratch-a").mkdir(parents=True)
    (tmp_path / "out" / ".scratch-a" / "link").symlink_to(outside)
    (tmp_path / "out" / "result.json").write_text(RESULT_TEXT)
    for name in left:
        (tmp_path / "out" / name).touch()
    assert run({"environment": PASS}) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["environment.log", "result.json"]
    assert (outside / "kept").is_file()


def test_a_link_to_a_folder(run: Callable[..., int], tmp_path: Path) -> None:
    """The archive holds the files, not the link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    for _ in range(2):
        assert run({"environment": PASS}) == 0
    with tarfile.open(tmp_path / "real.tar.gz") as packed:
        assert sorted(packed.getnames()) == ["real", "real/environment.log", "real/result.json"]


@pytest.mark.parametrize("option", ["--bundle", "--kernels"])
def test_a_missing_folder_is_wrong_usage(
    option: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run({"environment": PASS}, option, "nope") == 2
    assert capsys.readouterr().err == f"error: {option} nope is not a folder; pass an existing one.\n"
    assert not (tmp_path / "out").exists()


def test_paths_are_absolute_for_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "k"):
        (tmp_path / name).mkdir()
    steps = Steps({"a": PASS})
    monkeypatch.setattr(cli, "run_steps", steps)
    assert cli.main(["--output", "out", "--bundle", "b", "--kernels", "k"]) == 0
    (workspace,) = steps.workspaces
    assert (workspace.output, workspace.bundle, workspace.kernels) == (
        tmp_path / "out",
        tmp_path / "b",
        tmp_path / "k",
    )
    assert not workspace.scratch.exists()


def test_the_plan() -> None:
    every = plan.steps(plan.PARTS)
    names = [step.name for step in every]
    assert len(set(names)) == len(names)
    needs = {step.name: step.needs for step in every}
    assert needs["demo-cpu"] == ("demo-export",)
    for kind in ("functions", "plugins"):
        built = f"demo-{kind}-build"
        assert needs[built] == ("demo-export",)
        assert [needs[f"demo-{kind}{run}"] for run in ("", "-no-graph", "-cancel")] == [(built,)] * 3
    for variant in ("demo-int8-cache", "demo-w8a8"):
        exported, built = f"{variant}-export", f"{variant}-build"
        assert [needs[one] for one in (exported, f"{variant}-cpu", built, variant)] == [
            ("demo-export",),
            (exported,),
            (exported,),
            (built,),
        ]
    assert needs["full-size-build"] == ("full-size-export",)
    assert [needs[f"full-size-{name}"] for name in ("run", "windows")] == [("full-size-build",)] * 2
    assert [step.name for step in plan.steps(["environment"])] == ["environment"]
    assert [part for part in plan.PARTS if not plan.steps([part])] == []
    for number, step in enumerate(every):
        assert set(step.needs) <= set(names[:number])
        module, _, function = step.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_an_unknown_part_is_wrong_usage() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--only", "everything"])


def test_the_door_of_the_package(tmp_path: Path) -> None:
    """A whole run of the part that needs nothing."""
    command = [sys.executable, "-m", "fusion_edge.acceptance", "--only", "environment"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("PASS    environment")
    (step,) = json.loads((tmp_path / "fusion-acceptance" / "result.json").read_text())["steps"]
    figures = step["figures"]
    assert figures["memory"]["block"] >= 4096
    assert figures["memory"]["available"] > figures["memory"]["block"]
    assert figures["libraries"].keys() == {"tensorrt", "tensorrt-rtx"}
    assert figures["machine"]["versions"]["python"]
