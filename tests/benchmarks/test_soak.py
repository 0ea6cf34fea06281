"""The soak: a short one passes; wrong answers, unexpected errors and growth are found."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.paths import DEMO_CHECKPOINT

from fusion_edge.benchmarks import soak
from fusion_edge.benchmarks.simulated_cameras import QUESTIONS, Script, write_script
from fusion_edge.export import cli
from fusion_edge.runtime import Answer, Cancelled, Fusion


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model exported with ``--int4``."""
    folder = tmp_path_factory.mktemp("soak") / "demo"
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(folder), "--int4"]) == 0
    return folder


@pytest.fixture(autouse=True)
def two_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of two frames, which is computed in a second."""
    monkeypatch.setattr(soak, "FRAMES", 2)


def test_a_short_soak(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "soak.json"
    assert soak.main(["--bundle", str(demo_bundle), "--minutes", "0.05", "--json", str(file)]) == 0
    assert "(too short to judge)" in capsys.readouterr().out
    result = json.loads(file.read_text("utf-8"))
    assert result["problems"] == []
    assert result["seen"]["camera: stop"] > 0
    assert set(result["growth"]) == {"resident_bytes", "blocks", "threads", "descriptors"}


def test_wrong_answers_are_found(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_wrong(fusion: Fusion, count: int) -> Script:
        script = write_script(fusion, count)
        return replace(script, answers=dict.fromkeys(script.answers, (1,)))

    monkeypatch.setattr(soak, "write_script", write_wrong)
    assert soak.main(["--bundle", str(demo_bundle), "--minutes", "1"]) == 1
    assert "expected (1,)" in capsys.readouterr().err


class FakeFusion:
    """Answers nothing."""

    def conversation(self, image: object) -> FakeFusion:
        return self

    def answer(self, *_: object, **__: object) -> Answer:
        return answer(1)


def answer(*token_ids: int, **values: Any) -> Answer:
    made = Answer("", token_ids, 0, "stop", {}, 0.0)
    return replace(made, **values)


@pytest.fixture
def robot(monkeypatch: pytest.MonkeyPatch) -> soak.Robot:
    monkeypatch.setattr(soak, "Asker", lambda *_, **__: None)
    fusion: Any = FakeFusion()
    return soak.Robot(fusion, Script((), {}, ()), 0)


@pytest.mark.parametrize(
    ("found", "is_right"),
    [
        (answer(1, 2), True),
        (answer(1), False),  # complete, but too short
        (answer(2, 1), False),
        (answer(1, finish_reason="deadline"), True),  # the beginning
        (answer(2, finish_reason="cancelled"), False),
        (answer(1, 2, 3, finish_reason="cancelled"), False),
    ],
)
def test_an_answer_is_compared(robot: soak.Robot, found: Answer, is_right: bool) -> None:
    robot.check("kind", found, (1, 2))
    assert (robot.problems == []) == is_right
    assert robot.over.is_set() != is_right


def test_unexpected_errors_are_problems(robot: soak.Robot) -> None:
    def stopped() -> None:
        raise Cancelled("", "waiting", answer())

    robot.guarded("kind", stopped)
    assert robot.problems == []
    robot.guarded("kind", lambda: 1 // 0)
    assert "ZeroDivisionError" in robot.problems[0]


def test_growth_compares_medians_after_the_warm_up() -> None:
    monitor = soak.Monitor()
    sizes = [0.0] * 20 + [10.0] * 16 + [99.0] + [random.random() for _ in range(47)] + [30.0] * 15 + [0.0]
    monitor.samples = [{"resident_bytes": size, "blocks": 7, "threads": 3, "descriptors": 5} for size in sizes]
    assert monitor.growth() == {"resident_bytes": 20, "blocks": 0, "threads": 0, "descriptors": 0}


def test_questions_have_different_answers(demo_bundle: Path) -> None:
    from fusion_edge.runtime import load

    with load(demo_bundle) as fusion:
        script = write_script(fusion, 2)
    assert len(script.answers) == 2 * len(QUESTIONS)
    assert len(set(script.answers.values())) >= 5
