"""Calibration of the demo model's probabilities: figures of the table, and the committed plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fusion_edge.benchmarks.demo import reliability_plot
from fusion_edge.benchmarks.demo.pictures import KINDS, examples
from fusion_edge.benchmarks.demo.reliability import CHOICES, Asked, held_out, summary, table
from fusion_edge.benchmarks.plots import plotted_data


def test_the_right_answer_is_always_among_the_choices() -> None:
    assert CHOICES.keys() == KINDS.keys()
    for example, _ in zip(examples("held_out", 0, 5), range(300), strict=False):
        assert example.answer in CHOICES[example.kind]


def test_degraded_pictures_are_darker_and_repeatable() -> None:
    clear, degraded, again = (list(held_out(10, pictures)) for pictures in ("clear", "degraded", "degraded"))
    assert [one.question for one in clear] == [one.question for one in degraded]
    for bright, dark, same in zip(clear, degraded, again, strict=True):
        assert dark.picture.shape == bright.picture.shape
        assert dark.picture.mean() < 0.6 * bright.picture.mean()
        assert np.array_equal(dark.picture, same.picture)
    assert np.array_equal(degraded[0].picture, degraded[4].picture)  # one picture, five questions
    assert not np.array_equal(degraded[4].picture, degraded[5].picture)


def test_summary() -> None:
    asked = [
        Asked("color", probability=0.95, is_right=True, mass=1.0, confidence=0.95, is_exact=True),
        Asked("color", probability=0.95, is_right=False, mass=0.5, confidence=0.95, is_exact=False),
        Asked("count", probability=0.45, is_right=False, mass=0.9, confidence=0.15, is_exact=False),
        Asked("count", probability=0.45, is_right=True, mass=0.6, confidence=0.15, is_exact=False),
    ]
    result = summary(asked)
    assert result["choice_accuracy"] == 0.5
    assert result["choice_accuracy_by_kind"] == {"color": 0.5, "count": 0.5}
    assert result["choice_calibration_error"] == pytest.approx((0.45 + 0.05) / 2)
    assert result["answer_accuracy"] == 0.25
    assert result["answer_calibration_error"] == pytest.approx((0.45 + 0.15) / 2)
    assert result["mass_of_choices"] == pytest.approx(0.75)
    assert [(bin["low"], bin["count"]) for bin in result["bins"]] == [(0.4, 2), (0.9, 2)]
    row = {"format": "int4", "pictures": "clear", **result}
    assert table({"rows": [row]}).splitlines()[-1] == "| clear | int4 | 50.0% | 25.0% | 25.0% | 30.0% |"


def test_committed_plot_is_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reliability_plot.main(["--check"]) == 0
    changed = tmp_path / "changed.svg"
    changed.write_text(reliability_plot.PLOT.read_text("utf-8").replace("degraded", "other"), "utf-8")
    assert reliability_plot.main(["--check", "--output", str(changed)]) == 1
    assert "is outdated; draw it again" in capsys.readouterr().err


def test_drawing_gives_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for file in (first, second):
        assert reliability_plot.main(["--output", str(file)]) == 0
    assert first.read_text() == second.read_text()
    assert plotted_data(first) == json.loads(json.dumps(reliability_plot.read_data()))
