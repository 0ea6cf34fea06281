"""Calibration of the demo model's probabilities: choices, degraded pictures, the table, and the committed plot."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fusion_edge.benchmarks.demo import reliability_plot
from fusion_edge.benchmarks.demo.pictures import THINGS, examples
from fusion_edge.benchmarks.demo.reliability import (
    THING_CHOICES,
    Asked,
    candidates,
    held_out,
    main,
    summary,
    table,
)
from fusion_edge.benchmarks.plots import plotted_data
from fusion_edge.runtime.choices import check_choices, check_prefixes


def test_the_right_answer_is_always_among_few_choices() -> None:
    for number, example in enumerate(itertools.islice(examples("held_out", 0, 5), 300)):
        choices = candidates(example.kind, example.answer, number)
        assert example.answer in choices
        assert 2 <= len(choices) <= 9
        assert choices == check_choices(choices)
        check_prefixes(choices, choices)
        assert candidates(example.kind, example.answer, number) == choices


@pytest.mark.parametrize("answer", THINGS)
def test_choices_of_things_are_of_two_or_more_categories(answer: str) -> None:
    choices = [THINGS[name] for name in candidates("what", answer, 3)]
    assert len(choices) == THING_CHOICES
    assert sum(thing.category == THINGS[answer].category for thing in choices) == THING_CHOICES // 2


def test_place_of_the_right_answer_says_nothing() -> None:
    places = Counter(candidates("odd", "dog", number).index("dog") for number in range(800))
    assert all(60 < places[place] < 140 for place in range(THING_CHOICES))


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
        Asked("what", probability=0.95, is_right=True, mass=1.0, confidence=0.95, is_exact=True),
        Asked("what", probability=0.95, is_right=False, mass=0.5, confidence=0.95, is_exact=False),
        Asked("count", probability=0.45, is_right=False, mass=0.9, confidence=0.15, is_exact=False),
        Asked("count", probability=0.45, is_right=True, mass=0.6, confidence=0.15, is_exact=False),
    ]
    result = summary(asked)
    assert result["choice_accuracy"] == 0.5
    assert result["choice_accuracy_by_kind"] == {"what": 0.5, "count": 0.5}
    assert result["choice_calibration_error"] == pytest.approx((0.45 + 0.05) / 2)
    assert result["answer_accuracy"] == 0.25
    assert result["answer_calibration_error"] == pytest.approx((0.45 + 0.15) / 2)
    assert result["mass_of_choices"] == pytest.approx(0.75)
    assert [(bin["low"], bin["count"]) for bin in result["bins"]] == [(0.4, 2), (0.9, 2)]
    row = {"format": "int4", "pictures": "clear", **result}
    assert table({"rows": [row]}).splitlines()[-1] == "| clear | int4 | 50.0% | 25.0% | 25.0% | 30.0% |"


def test_command_asks_about_clear_and_degraded_pictures(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    options = ["--checkpoint", str(tiny_checkpoint), "--questions", "3", "--json", str(file)]
    assert main(options) == 0
    rows = json.loads(file.read_text("utf-8"))["rows"]
    expected = [(name, pictures) for name in ("fp32", "int4") for pictures in ("clear", "degraded")]
    assert [(row["format"], row["pictures"]) for row in rows] == expected
    assert all(0 <= row["choice_calibration_error"] <= 1 for row in rows)
    assert capsys.readouterr().out.endswith(table({"rows": rows}))


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
