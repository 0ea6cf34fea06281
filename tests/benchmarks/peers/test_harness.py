"""The harness of side-by-side comparisons, with interpreters that only pretend to measure."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusion_edge.benchmarks.peers import harness
from fusion_edge.benchmarks.peers.harness import Answer, Column, Comparison, Contestant, Runner, Turn
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError

FAKE = Runner("fake.runner", "a fake model")


@dataclass(frozen=True)
class Work:
    """A fake workload."""

    tokens: int = 10
    max_steps: int = 3


COMPARISON = Comparison(
    "fakes",
    {"ours": FAKE, "a-peer": FAKE},
    Work,
    (Column("time", "seconds", lambda value: f"{value:.1f} s"), Column("rate", "rate", str, is_more_better=True)),
)


def interpreter(folder: Path, body: str) -> str:
    """A program that takes an interpreter's place: the arguments are ``-m MODULE MODEL WORKLOAD``."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


ANSWERS = """
work = json.loads(sys.argv[4])
assert sys.argv[1:3] == ["-m", "fake.runner"]
with open(sys.argv[3], "a") as log:
    log.write("x")
figures = {"seconds": float(work["tokens"]), "rate": 1.0 + len(open(sys.argv[3]).read())}
print("the peer's own chatter")
print(json.dumps({"figures": figures, "settings": {"threads": 2}, "versions": {"peer": "1"}}))
"""


def turn(seconds: float, rate: float) -> Turn:
    return Turn(Answer({"seconds": seconds, "rate": rate}, {}, {}), 0.0, 0.0)


def command(arguments: Sequence[str]) -> int:
    """The comparison of fakes as a command."""
    parser = argparse.ArgumentParser()
    harness.add_options(parser, COMPARISON)
    return run_command(lambda parsed: harness.run(COMPARISON, parsed), parser.parse_args(arguments))


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def run_alone(contestant: Contestant, workload: object) -> Turn:
        order.append(contestant.label)
        return turn(1.0, 1.0)

    monkeypatch.setattr(harness, "run_alone", run_alone)
    turns = harness.compare([Contestant(label, FAKE, Path(label)) for label in "ABC"], Work(), rounds=2)
    assert order == list("ABCABC")
    assert {label: len(one) for label, one in turns.items()} == {"A": 2, "B": 2, "C": 2}


def test_medians_are_taken_figure_by_figure() -> None:
    assert harness.medians([turn(1.0, 9.0), turn(3.0, 7.0), turn(2.0, 8.0)]) == {"seconds": 2.0, "rate": 8.0}


def test_ratios_say_how_many_times_better_the_first_is() -> None:
    table = harness.render({"ours": [turn(2.0, 8.0)], "peer": [turn(5.0, 4.0)]}, COMPARISON.columns).splitlines()
    assert table[0].split() == ["time", "rate"]
    assert table[1].count("(1.00x)") == 2
    assert "5.0 s  (2.50x)" in table[2]
    assert "4.0  (2.00x)" in table[2]


def test_report_holds_every_turn_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(tmp_path, ANSWERS)
    models = [tmp_path / "model-a", tmp_path / "model-b"]
    arguments = [f"--ours=a={models[0]}", f"--a-peer=b={models[1]}", f"--python=ours={python}"]
    arguments += [f"--python=a-peer={python}", "--rounds=2", "--max-steps=7", f"--json={tmp_path / 'report.json'}"]
    assert command(arguments) == 0
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    assert report["workload"] == {"tokens": 10, "max_steps": 7}
    peer = report["contestants"]["b"]
    assert (peer["runner"], peer["model"]) == ("runner", "model-b")
    assert (peer["settings"], peer["versions"]) == ({"threads": 2}, {"peer": "1"})
    assert [(one["seconds"], one["rate"]) for one in peer["turns"]] == [(10.0, 2.0), (10.0, 3.0)]
    assert all(one["disturbance"] >= 0 and one["load_average"] >= 0 for one in peer["turns"])
    assert report["machine"]["cores"] >= 1
    assert str(tmp_path) not in text
    assert "10.0 s  (1.00x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit(3)", "failed with exit code 3"),
        ("print('no JSON')", "did not answer in its last line"),
        ("pass", "did not answer in its last line"),
        ("print('{\"figures\": {}}')", "did not answer in its last line"),
    ],
)
def test_a_runner_that_fails_ends_the_comparison(tmp_path: Path, body: str, message: str) -> None:
    contestant = Contestant("peer", FAKE, tmp_path, interpreter(tmp_path, body))
    with pytest.raises(FusionError, match=message):
        harness.run_alone(contestant, Work())


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([f"--a-peer=b={tmp_path}", f"--python=a-peer={tmp_path / 'nowhere'}"]) == 1
    assert "nowhere for b: No such file" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command([]) == 2
    assert "--ours or --a-peer" in capsys.readouterr().err
    assert command(["--ours", "a=x", "--a-peer", "a=y"]) == 2
    assert "every label once" in capsys.readouterr().err
    assert command(["--ours", "a=x", "--python", "theirs=python3"]) == 2
    assert "--python theirs: there is no such runner; expected ours, a-peer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--ours", "no-label"])
    assert "'no-label' is not of the form NAME=PATH" in capsys.readouterr().err


def test_options_come_from_the_workload() -> None:
    parser = argparse.ArgumentParser()
    harness.add_options(parser, COMPARISON)
    for field in dataclasses.fields(Work):
        assert getattr(parser.parse_args([]), field.name) == field.default
