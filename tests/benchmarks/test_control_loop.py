"""The control loop's benchmark: what counts as missed and as wrong, and a short run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.paths import DEMO_CHECKPOINT

from fusion_edge.benchmarks import control_loop
from fusion_edge.benchmarks.control_loop import Answers, Ticks
from fusion_edge.export import cli
from fusion_edge.runtime import Answer, Cancelled, FusionError, Superseded

ANSWER = Answer("", (1, 2), 0, "stop", {}, 0.0)


def test_missed_ticks_are_counted_with_and_without_the_kernel_s_part() -> None:
    ticks = Ticks(delays=[0.001] * 97 + [0.006, 0.007, 0.02], queued=[0.0] * 97 + [0.0, 0.004, 0.016])
    summary = ticks.summary()
    assert (summary["ticks"], summary["missed"], summary["missed_by_the_process"]) == (100, 3, 1)
    assert (summary["p50_ms"], summary["p99_ms"], summary["max_ms"]) == (1, 20, 20)
    assert summary["max_by_the_process_ms"] == pytest.approx(6)


class Ended:
    """A request that has ended."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def result(self) -> Answer:
        if self._error is not None:
            raise self._error
        return ANSWER


def test_answers_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers()
    stopped = [Ended(kind("", "waiting", ANSWER)) for kind in (Superseded, Cancelled)]
    requests: list[Any] = [Ended(), Ended(), *stopped, Ended(FusionError("broken"))]
    for expected, request in zip([(1, 2), (1,), (), (), ()], requests, strict=True):
        answers.check(expected, request)
    assert answers == Answers(right=1, wrong=1, failed=1)
    assert capsys.readouterr().err == "broken\n"


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, file = tmp_path / "demo", tmp_path / "control.json"
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(bundle), "--int4"]) == 0
    monkeypatch.setattr(control_loop, "FRAMES", 2)
    arguments = ["--bundle", str(bundle), "--seconds", "1", "--rounds", "1", "--json", str(file)]
    assert control_loop.main(arguments) == 0
    results = json.loads(file.read_text("utf-8"))["results"]
    assert [results[setting]["ticks"] for setting in control_loop.SETTINGS] == [5, 5, 5]
    for setting in ("asker", "process"):
        assert results[setting]["asked"][0]["wrong"] == 0
