"""The harness of engine comparisons, with fake interpreters."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT
from support.schema_digest import schema_digest

from fusion_edge.benchmarks.peers import harness
from fusion_edge.benchmarks.peers.harness import Column, Contestant, PeerComparison, Round, Runner, WorkerReport
from fusion_edge.benchmarks.peers.result import SCHEMA, PeersResult, read_result
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError

FAKE = Runner("fake.runner", "a fake model")


@dataclass(frozen=True)
class Work:
    """Fake workload."""

    tokens: int = 10
    max_steps: int = 3


COMPARISON = PeerComparison(
    "fakes",
    {"ours": FAKE, "a-peer": FAKE},
    Work,
    (Column("time", "seconds", lambda value: f"{value:.1f} s"), Column("rate", "rate", str, higher_is_better=True)),
)


def interpreter(folder: Path, body: str) -> str:
    """Write a fake interpreter with the arguments ``-m MODULE MODEL WORKLOAD``."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


WORKER = """
work = json.loads(sys.argv[4])
assert sys.argv[1:3] == ["-m", "fake.runner"]
with open(sys.argv[3], "a") as log:
    log.write("x")
figures = {"seconds": float(work["tokens"]), "rate": 1.0 + len(open(sys.argv[3]).read())}
print("output of the engine")
print(json.dumps({"figures": figures, "settings": {"threads": 2}, "versions": {"peer": "1"}}))
"""


def one_round(seconds: float, rate: float) -> Round:
    return Round(WorkerReport({"seconds": seconds, "rate": rate}, {}, {}), 0.0, 0.0)


def command(arguments: Sequence[str]) -> int:
    """Run the comparison of fakes as a command."""
    parser = argparse.ArgumentParser()
    harness.add_options(parser, COMPARISON)
    return run_command(lambda parsed: harness.run(COMPARISON, parsed), parser.parse_args(arguments))


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def run_worker(contestant: Contestant, workload: object) -> Round:
        order.append(contestant.label)
        return one_round(1.0, 1.0)

    monkeypatch.setattr(harness, "run_worker", run_worker)
    rounds = harness.run_rounds([Contestant(label, FAKE, Path(label)) for label in "ABC"], Work(), count=2)
    assert order == list("ABCABC")
    assert {label: len(one) for label, one in rounds.items()} == {"A": 2, "B": 2, "C": 2}


def test_medians_are_taken_figure_by_figure() -> None:
    found = harness.figures([one_round(1.0, 9.0), one_round(3.0, 7.0), one_round(2.0, 8.0)])
    assert {name: summary.p50 for name, summary in found.items()} == {"seconds": 2.0, "rate": 8.0}
    assert found["rate"].values == (9.0, 7.0, 8.0)


def test_table_shows_the_speedup_of_the_first() -> None:
    contestants = [Contestant(label, FAKE, Path(label)) for label in ("ours", "peer")]
    rounds = {"ours": [one_round(2.0, 8.0)], "peer": [one_round(5.0, 4.0)]}
    result = harness.peers_result(contestants, Work(), rounds)
    table = harness.table(result, COMPARISON.columns).splitlines()
    assert table[0].split() == ["time", "rate"]
    assert table[1].count("(1.00x)") == 2
    assert "5.0 s  (2.50x)" in table[2]
    assert "4.0  (2.00x)" in table[2]


def test_a_changed_schema_has_a_new_version() -> None:
    """A changed field needs a new version in result.py, and the new digest here."""
    assert (SCHEMA.version, schema_digest(PeersResult)) == (1, "f2408a7642e2615b")


def test_result_holds_every_round_and_no_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(tmp_path, WORKER)
    models = [tmp_path / "model-a", tmp_path / "model-b"]
    file = tmp_path / "result.json"
    arguments = [f"--ours=a={models[0]}", f"--a-peer=b={models[1]}", f"--python=ours={python}"]
    arguments += [f"--python=a-peer={python}", "--rounds=2", "--max-steps=7", f"--json={file}"]
    assert command(arguments) == 0
    result = read_result(file)
    assert result.workload == {"tokens": 10, "max_steps": 7}
    peer = result.contestants["b"]
    assert (peer.runner, peer.model) == ("runner", "model-b")
    assert (peer.settings, peer.versions) == ({"threads": 2}, {"peer": "1"})
    assert (peer.figures["seconds"].values, peer.figures["rate"].values) == ((10.0, 10.0), (2.0, 3.0))
    assert min(peer.disturbance) >= 0
    assert min(peer.load_average) >= 0
    assert result.machine.cores >= 1
    assert str(tmp_path) not in file.read_text()
    assert "10.0 s  (1.00x)" in capsys.readouterr().out


def test_other_files_are_refused() -> None:
    with pytest.raises(FusionError, match="is not a fusion-edge peers result; expected a file that python -m"):
        read_result(ROOT / "benchmarks" / "results" / "llm_peers_cpu.json")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit(3)", "failed with exit code 3"),
        ("print('no JSON')", "printed no JSON report in its last line"),
        ("pass", "printed no JSON report in its last line"),
        ("print('{\"figures\": {}}')", "printed no JSON report in its last line"),
    ],
)
def test_failing_runner_ends_the_comparison(tmp_path: Path, body: str, message: str) -> None:
    contestant = Contestant("peer", FAKE, tmp_path, interpreter(tmp_path, body))
    with pytest.raises(FusionError, match=message):
        harness.run_worker(contestant, Work())


def test_missing_interpreter_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([f"--a-peer=b={tmp_path}", f"--python=a-peer={tmp_path / 'nowhere'}"]) == 1
    assert "nowhere for b: No such file" in capsys.readouterr().err


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command([]) == 2
    assert "--ours or --a-peer" in capsys.readouterr().err
    assert command(["--ours", "a=x", "--a-peer", "a=y"]) == 2
    assert "a label is not unique" in capsys.readouterr().err
    assert command(["--ours", "a=x", "--python", "theirs=python3"]) == 2
    assert "--python theirs: unknown runner; choose from ours, a-peer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--ours", "no-label"])
    assert "'no-label' is not of the form NAME=PATH" in capsys.readouterr().err


def test_options_come_from_the_workload() -> None:
    parser = argparse.ArgumentParser()
    harness.add_options(parser, COMPARISON)
    for field in dataclasses.fields(Work):
        assert getattr(parser.parse_args([]), field.name) == field.default
