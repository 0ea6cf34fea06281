"""The comparison's arithmetic and its refusals; runs against the peer itself need the peer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_edge.benchmarks import llm_against_genai
from fusion_edge.benchmarks.llm_against_genai import Contestant, Result, Workload, compare, main, median, render
from fusion_edge.runtime.errors import UsageError

FAST = Result(1.0, 10.0, 20.0, 2_000_000_000, 3_000_000_000)
SLOW = Result(2.0, 25.0, 8.0, 6_000_000_000, 6_000_000_000)


def test_timed_steps_lie_around_the_context() -> None:
    work = Workload(prompt=900, context=1000, steps=32)
    first = work.prompt + work.untimed_steps
    assert (first + first + work.steps) / 2 == 1000
    assert len(work.prompt_ids) == 900


@pytest.mark.parametrize("sizes", [{"context": 910}, {"context": 4090}, {"prompt": 1000}])
def test_workloads_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        Workload(**sizes)


def test_median_is_taken_field_by_field() -> None:
    middle = Result(1.5, 30.0, 9.0, 4_000_000_000, 5_000_000_000)
    assert median([FAST, SLOW, middle]) == Result(1.5, 25.0, 9.0, 4_000_000_000, 5_000_000_000)


def test_ratios_say_how_much_better_the_first_is() -> None:
    lines = render({"fusion-edge": [FAST], "peer": [SLOW]}).splitlines()
    assert lines[1].count("(1.00x)") == 4
    assert "8.00 tokens/s  (2.50x)" in lines[2]
    assert "25.00 s  (2.50x)" in lines[2]
    assert "6.00 GB  (3.00x)" in lines[2]
    assert "6.00 GB  (2.00x)" in lines[2]


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measure(contestant: Contestant, work: Workload) -> Result:
        order.append(contestant.label)
        return FAST

    monkeypatch.setattr(llm_against_genai, "_measure_alone", measure)
    contestants = [Contestant(label, "genai", Path(label)) for label in "ABC"]
    results = compare(contestants, Workload(), rounds=2)
    assert order == list("ABCABC")
    assert {label: len(runs) for label, runs in results.items()} == {"A": 2, "B": 2, "C": 2}


def test_a_failed_child_ends_the_comparison(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", f"ours={tmp_path / 'nowhere'}", "--rounds", "1"]) == 1
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert "nowhere" in first
    assert last == "error: The run of ours failed with exit code 1."


def test_labels_are_needed_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--genai", "a=x", "--genai", "a=y"]) == 2
    with pytest.raises(SystemExit):
        main(["--genai", "no-label"])
    assert "LABEL=DIR" in capsys.readouterr().err


def test_report_holds_every_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_against_genai, "_measure_alone", lambda contestant, work: SLOW)
    path = tmp_path / "report.json"
    assert main(["--genai", "peer=folder", "--rounds", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [run["prefill_seconds"] for run in report["results"]["peer"]] == [25.0, 25.0]
    assert report["workload"]["threads"] == 2
    assert "onnxruntime" in report["versions"]
