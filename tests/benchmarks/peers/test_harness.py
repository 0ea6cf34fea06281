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

from fusion_edge.benchmarks.peers import harness, llm, vision
from fusion_edge.benchmarks.peers.harness import Column, Contestant, PeerComparison, Round, Runner, WorkerReport
from fusion_edge.benchmarks.peers.result import SCHEMA, PeersResult, read_result
from fusion_edge.benchmarks.peers.runners.worker import Workload
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError

FAKE = Runner("fake.runner", "a fake model")
TRIED = Runner("fake.runner", "a fake model", {name: {"precision": name} for name in ("low", "middle", "high")})


@dataclass(frozen=True)
class Work(Workload):
    """Fake workload."""

    tokens: int = 10
    max_steps: int = 3


COMPARISON = PeerComparison(
    "fakes",
    {"ours": FAKE, "a-peer": FAKE},
    Work,
    (
        Column("time", "seconds", lambda value: f"{value:.1f} s", is_phase=True),
        Column("rate", "rate", str, higher_is_better=True, is_phase=True),
        Column("memory", "memory", str),
    ),
)
COLUMNS = COMPARISON.columns


def interpreter(folder: Path, body: str) -> str:
    """Write a fake interpreter with the arguments ``-m MODULE MODEL WORKLOAD SETTINGS``."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


WORKER = """
work = json.loads(sys.argv[4])
assert sys.argv[1:3] == ["-m", "fake.runner"]
with open(sys.argv[3], "a") as log:
    log.write("x")
figures = {"seconds": float(work["tokens"]), "rate": 1.0 + len(open(sys.argv[3]).read()), "memory": 5.0}
print("output of the engine")
print(json.dumps({"figures": figures, "settings": {"threads": 2}, "versions": {"peer": "1"}}))
"""


def one_round(seconds: float, rate: float, memory: float = 1.0) -> Round:
    return Round(WorkerReport({"seconds": seconds, "rate": rate, "memory": memory}, {}, {}), 0.0, 0.0)


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
    rounds = harness.run_rounds([Contestant(label, FAKE, Path(label)) for label in "ABC"], Work(), 2, COLUMNS)
    assert order == list("ABCABC")
    assert {label: len(one) for label, one in rounds.items()} == {"A": 2, "B": 2, "C": 2}


def test_later_rounds_run_the_best_setting_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    first = {
        "peer: low": one_round(3.0, 9.0, 30.0),  # fastest rate
        "peer: middle": one_round(4.0, 8.0, 40.0),
        "peer: high": one_round(2.0, 7.0, 20.0),  # shortest time
        "ours": one_round(1.0, 18.0, 10.0),
    }

    def run_worker(contestant: Contestant, workload: object) -> Round:
        order.append(contestant.title)
        return first[contestant.title] if order.count(contestant.title) == 1 else one_round(4.0, 5.0, 6.0)

    monkeypatch.setattr(harness, "run_worker", run_worker)
    contestants = [Contestant("ours", FAKE, Path("ours"))]
    contestants += [Contestant("peer", TRIED, Path("peer"), setting=setting) for setting in TRIED.settings]
    rounds = harness.run_rounds(contestants, Work(), 2, COLUMNS)
    assert order == ["ours", "peer: low", "peer: middle", "peer: high", "ours", "peer: low", "peer: high"]
    result = harness.peers_result(contestants, Work(), rounds)
    # Chosen by the first round, although the medians of two rounds are worse than the first round of "middle".
    assert harness.best_titles(result, "peer", COLUMNS) == ["peer: high", "peer: low", "peer: low"]
    lines = harness.table(result, COLUMNS).splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["peer", "3.0", "s", "(1.20x)", "7.0", "(1.64x)", "18.0", "(2.25x)", "high;", "low"]


def test_medians_are_taken_figure_by_figure() -> None:
    found = harness.figures([one_round(1.0, 9.0), one_round(3.0, 7.0), one_round(2.0, 8.0)])
    assert {name: summary.p50 for name, summary in found.items()} == {"seconds": 2.0, "rate": 8.0, "memory": 1.0}
    assert found["rate"].values == (9.0, 7.0, 8.0)


def test_table_shows_the_speedup_of_the_first() -> None:
    contestants = [Contestant(label, FAKE, Path(label)) for label in ("ours", "peer")]
    rounds = {"ours": [one_round(2.0, 8.0)], "peer": [one_round(5.0, 4.0)]}
    result = harness.peers_result(contestants, Work(), rounds)
    table = harness.table(result, COLUMNS).splitlines()
    assert table[0].split() == ["time", "rate", "memory", "settings"]
    assert table[1].count("(1.00x)") == 3
    assert "5.0 s  (2.50x)" in table[2]
    assert "4.0  (2.00x)" in table[2]


def test_a_changed_schema_has_a_new_version() -> None:
    """A changed field needs a new version in result.py, and the new digest here."""
    assert (SCHEMA.version, schema_digest(PeersResult)) == (2, "aec942b5b5aab34b")


def test_result_holds_every_round_and_no_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(tmp_path, WORKER)
    models = [tmp_path / "model-a", tmp_path / "model-b"]
    file = tmp_path / "result.json"
    arguments = [f"--ours=a={models[0]}", f"--a-peer=b={models[1]}", f"--python=ours={python}"]
    arguments += [f"--python=a-peer={python}", "--rounds=2", "--max-steps=7", f"--json={file}"]
    assert command(arguments) == 0
    result = read_result(file)
    assert result.workload == {"threads": 2, "isa": None, "tokens": 10, "max_steps": 7}
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


def test_engines_get_their_setting_and_the_variables_of_an_instruction_set(tmp_path: Path) -> None:
    body = """
import os
keys = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
settings = {"given": json.loads(sys.argv[5]), "environment": [os.environ.get(key) for key in keys]}
print(json.dumps({"figures": {}, "settings": settings, "versions": {}}))
"""
    contestant = Contestant("peer", TRIED, tmp_path, interpreter(tmp_path, body), "middle")
    for isa, environment in (
        (None, [None] * 4),
        ("avx512_vnni", ["AVX512_CORE_VNNI", "AVX512_CORE_VNNI", "avx512", "AVX512"]),
        ("avx_vnni", ["AVX2_VNNI", "AVX2_VNNI", "avx2", "AVX2"]),
        ("avx2", ["AVX2", "AVX2", "avx2", "AVX2"]),
    ):
        settings = harness.run_worker(contestant, Work(isa=isa)).report.settings
        assert settings == {"given": {"precision": "middle"}, "environment": environment}


def test_settings_that_an_instruction_set_lacks_are_not_tried() -> None:
    for comparison in (llm.COMPARISON, vision.COMPARISON):
        runner = comparison.runners["openvino"]
        assert runner.tried(None) == list(runner.settings)
        floats = [name for name in runner.settings if "bf16" not in name]
        assert runner.tried("avx512_vnni") == floats
        assert runner.tried("avx2") == [name for name in floats if "groups of" not in name] != []


def test_an_unknown_instruction_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--ours", "a=x", "--isa", "sse2"])
    assert "choose from avx512_vnni, avx_vnni, avx2" in capsys.readouterr().err.replace("'", "")


def test_options_come_from_the_workload() -> None:
    parser = argparse.ArgumentParser()
    harness.add_options(parser, COMPARISON)
    for field in dataclasses.fields(Work):
        assert getattr(parser.parse_args([]), field.name) == field.default
