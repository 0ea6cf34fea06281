"""The committed plot of LLM speed shows the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_edge.benchmarks import plots


def test_committed_plot_is_up_to_date() -> None:
    assert plots.main(["--check"]) == 0


def test_outdated_plot_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tmp_path / "changed.svg"
    changed.write_text(plots.PLOT.read_text("utf-8").replace("prefill tokens/s", "tokens/s"), "utf-8")
    assert plots.main(["--check", "--output", str(changed)]) == 1
    assert "is outdated; draw it again" in capsys.readouterr().err
    assert plots.main(["--check", "--output", str(tmp_path / "nowhere.svg")]) == 1
    assert "is not a plot with data" in capsys.readouterr().err


def test_results_of_either_schema_are_read() -> None:
    old = {"turns": [{"seconds": 3.0}, {"seconds": 1.0}, {"seconds": 2.0}]}
    new = {"figures": {"seconds": {"p50": 2.0, "values": [3.0, 1.0, 2.0]}}}
    assert plots._median(old, "seconds") == plots._median(new, "seconds") == 2.0


def test_drawing_gives_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for file in (first, second):
        assert plots.main(["--output", str(file)]) == 0
    assert first.read_text() == second.read_text()
    assert plots.plotted_data(first) == json.loads(json.dumps(plots.read_data()))
