"""``fusion-bench`` on the command line."""

from __future__ import annotations

import csv
import io
import json
import mmap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.demo_model import PICTURE
from support.paths import ROOT

from fusion_edge.benchmarks.latency import bench, cli, peaks, stages
from fusion_edge.benchmarks.latency.machine import energy
from fusion_edge.benchmarks.latency.machine.energy import EnergyUse
from fusion_edge.benchmarks.latency.peaks import BandwidthReader
from fusion_edge.benchmarks.latency.result import STAGES, BenchResult, Peaks, read_result
from fusion_edge.benchmarks.latency.stages import Times
from fusion_edge.runtime.backends.base import Backend
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.stages import DECODE_STEP, SAMPLING

FEW = ("--new-tokens", "3", "--threads", "1", "--backend", "cpu")
SHORT = ("--seconds", "1")


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the probes, which test_peaks.py tests."""
    monkeypatch.setattr(bench, "measure_peaks", lambda device, threads: Peaks(None, 150e9, {}))
    monkeypatch.setattr(peaks, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "QUIET", 0)
    return iter([None])


@pytest.fixture
def result_of(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[BenchResult, Path]]:
    """Return a function that runs ``fusion-bench --json`` and returns the result and its file."""

    def run(*options: str) -> tuple[BenchResult, Path]:
        capsys.readouterr()
        assert cli.main([str(tiny_bundle), *FEW, *(options or SHORT), "--json"]) == 0
        file = tmp_path / f"result-{len(list(tmp_path.iterdir()))}.json"
        file.write_text(capsys.readouterr().out)
        return read_result(file), file

    return run


def test_result(
    result_of: Callable[..., tuple[BenchResult, Path]], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([50e9, 20e9, 10e9])
    monkeypatch.setattr(BandwidthReader, "sample", lambda self: self.rates.extend([next(seen, 20e9)]))
    result, _ = result_of()
    (measured,) = result.cases
    assert tuple(measured.stages) == STAGES
    assert result.command == f"fusion-bench {tiny_bundle} {' '.join(FEW)} {' '.join(SHORT)} --json"
    files = [file for file in tiny_bundle.iterdir() if file.name != "bundle.json"]
    assert result.bundle.size == sum(file.stat().st_size for file in files)
    assert (measured.case.device, measured.case.threads, measured.case.new_tokens) == ("cpu", 1, 3)
    assert measured.followup_ttft.p50 > 0
    assert 0 < measured.ttft.p50 < measured.answer.p50
    assert measured.decode_tokens_per_second == pytest.approx(
        1 / (measured.stages[DECODE_STEP].p50 + measured.stages[SAMPLING].p50)
    )
    assert result.peaks == {"cpu": Peaks(20e9, 150e9, {})}
    assert measured.roofline.decode.roofline_seconds == measured.roofline.decode.work / 20e9  # sampled between steps
    assert measured.roofline.prefill.roofline_seconds == measured.roofline.prefill.work / 150e9
    assert measured.roofline.prefill.share is not None
    assert 0 < measured.memory.loaded <= measured.memory.load_peak
    assert measured.memory.steady <= measured.memory.peak
    assert measured.memory.over_time
    assert measured.device_memory is None


def test_matrix(result_of: Callable[..., tuple[BenchResult, Path]]) -> None:
    result, _ = result_of(
        *("--query-len", "4,16", "--context", "100,150", "--backend", "cpu,cpu", "--image-tokens", "9", *SHORT)
    )
    cases = [(measured.case.query_length, measured.case.context) for measured in result.cases]
    assert cases == [(4, 100), (4, 150), (16, 100), (16, 150)]
    assert {measured.case.image_tokens for measured in result.cases} == {9}


def test_each_case_has_its_own_memory(
    result_of: Callable[..., tuple[BenchResult, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case's memory is not in another case's peak or history; memory it keeps is in the next case."""
    taken, kept = 256 << 20, 96 << 20  # far above the noise of some tens of megabytes
    blocks: list[mmap.mmap] = []
    cases = iter([(taken, 0), (0, kept), (0, 0)])

    def measured(*arguments: Any) -> Times:
        for size, is_kept in zip(next(cases), (False, True), strict=True):
            if size:
                block = mmap.mmap(-1, size)
                block.write(b"\1" * size)
                time.sleep(0.15)
                if is_kept:
                    blocks.append(block)
                else:
                    block.close()
        return stages.measure(*arguments)

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(peaks, "READ_BYTES", 400 << 20)
    result, _ = result_of("--context", "100,150,200", *SHORT)
    first, second, third = (one.memory for one in result.cases)
    assert first.steady < first.loaded + (200 << 20)  # the bandwidth reader's memory does not count
    assert first.peak - first.steady > 0.8 * taken
    assert second.peak < first.peak - 0.5 * taken
    assert third.steady >= second.steady > first.steady + 0.5 * kept
    assert {memory.loaded for memory in (first, second, third)} == {first.loaded}
    for memory in (first, second, third):
        assert memory.over_time[0][0] < 0.1
        assert max(size for _, size in memory.over_time) <= memory.peak
    blocks[0].close()


def test_own_image_and_question(
    result_of: Callable[..., tuple[BenchResult, Path]], tmp_path: Path, tiny_bundle: Path
) -> None:
    picture = PICTURE
    short, _ = result_of("--image", str(picture), "--ask", "Red?", *SHORT)
    long, _ = result_of("--image", str(picture), "--ask", "Is there anything red to be seen on the left?", *SHORT)
    assert short.cases[0].case.prompt_tokens < long.cases[0].case.prompt_tokens


def test_soak(result_of: Callable[..., tuple[BenchResult, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_edge.benchmarks.latency.stages.Times.are_precise", True)
    quick, _ = result_of("--seconds", "60")
    soaked, _ = result_of("--duration", "1")
    assert quick.cases[0].ttft.count == 3
    spent = sum(soaked.cases[0].answer.values) + sum(soaked.cases[0].followup_ttft.values)
    assert soaked.cases[0].ttft.count > 3 or spent > 0.5  # a busy machine has no time for a fourth round


def test_energy_covers_decode_steps_only(
    result_of: Callable[..., tuple[BenchResult, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    prefill = OnnxRuntimeBackend.prefill

    def no_prefill(self: Backend, *_: object) -> None:
        raise AssertionError("A prefill is in the window.")

    class Meter:
        def __init__(self, gpu: object) -> None: ...

        def __enter__(self) -> Meter:
            monkeypatch.setattr(OnnxRuntimeBackend, "prefill", no_prefill)
            return self

        def __exit__(self, *_: object) -> None:
            monkeypatch.setattr(OnnxRuntimeBackend, "prefill", prefill)

        def energy(self, count: int) -> EnergyUse:
            tokens.append(count)
            return EnergyUse("a meter", 6.0, 30.0, 30.0 / count)

    monkeypatch.setattr(energy, "sources", lambda gpu, root: ["a meter"])
    monkeypatch.setattr(energy, "EnergyMeter", Meter)
    result, _ = result_of()
    assert result.cases[0].energy is None  # the context ends before five seconds of steps
    assert tokens == []
    monkeypatch.setattr(bench, "ENERGY_SECONDS", 0.02)
    monkeypatch.setattr(energy, "MIN_WINDOW", 0.01)
    result, _ = result_of()
    (measured,) = result.cases
    assert measured.energy == EnergyUse("a meter", 6.0, 30.0, 30.0 / tokens[0])
    assert 0.01 <= tokens[0] * measured.stages[DECODE_STEP].p50 <= 0.03


def test_tables_and_a_report(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.html"
    assert cli.main([str(tiny_bundle), *FEW, *SHORT, "--html", str(report)]) == 0
    assert "follow-up TTFT" in capsys.readouterr().out
    assert "<title>" in report.read_text()
    assert cli.main([str(tiny_bundle), *FEW, *SHORT, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["stage"] for row in rows} >= set(STAGES)


def test_compare(
    result_of: Callable[..., tuple[BenchResult, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, before = result_of("--seconds", "5")
    data = json.loads(before.read_text())
    for summary in (*data["cases"][0]["stages"].values(), data["cases"][0]["ttft"]):
        for key in ("min", "p50", "p95", "p99", "max"):
            summary[key] *= 3
        summary["values"] = [3 * value for value in summary["values"]]
        if summary["ci95"] is not None:  # too few rounds on a busy machine
            summary["ci95"] = [3 * value for value in summary["ci95"]]
    after = tmp_path / "after.json"
    after.write_text(json.dumps(data))
    assert cli.main(["compare", str(before), str(before), "--fail-above", "5%"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(before), str(after)]) == 0
    assert "slower" in capsys.readouterr().out
    assert cli.main(["compare", str(before), str(after), "--fail-above", "5%"]) == 1
    assert cli.main(["compare", str(after), str(before), "--fail-above", "5"]) == 0
    assert cli.main(["compare", str(before), str(after), "--json"]) == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--query-len", "9"], 2, "Query length 9 is not offered; choose from 16, 4"),
        (["--threads", "4096"], 2, "--threads is 4096; choose at most"),
        (["--html", "/"], 1, "/ is not a regular file and is not replaced; choose another file."),
        (["--prompt-tokens", "5"], 2, "--prompt-tokens 5 is too small"),
        (["--context", "100000"], 2, "A context of 100000 and 3 new tokens exceed the limit of 512 tokens"),
        (["--image-tokens", "7"], 2, "--image-tokens 7 is not a square number"),
        (["--image", "nowhere.jpg"], 1, "nowhere.jpg"),
        (["--image", __file__], 1, "test_fusion_bench.py"),
        (["--ask", ""], 2, "The question is empty"),
        (["--ask", " "], 2, "The question is empty"),
        (["--html", "nowhere/report.html"], 1, "nowhere is not a folder"),
    ],
)
def test_wrong_options(
    tiny_bundle: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    message: str,
) -> None:
    def decode(self: Backend, embedding: object) -> None:
        raise AssertionError("A case ran before all options were checked.")

    monkeypatch.setattr("fusion_edge.runtime.backends.onnxruntime.backend.OnnxRuntimeBackend.decode", decode)
    assert message in refused(cli.main, tiny_bundle, *FEW, *options, code=code)


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "tpu"],
        ["--backend", "auto,cpu"],
        ["--threads", "0"],
        ["--json", "--csv"],
        ["--seconds", "x"],
        ["--seconds", "1", "--duration", "1"],
    ],
)
def test_wrong_usage(tiny_bundle: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(tiny_bundle), *options])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read"),
        ("{", "Cannot read"),
        ("[]", "is not a fusion-bench result"),
        ("{}", "is not a fusion-bench result"),
        ('{"schema": "fusion-edge peers", "schema_version": 4}', "is not a fusion-bench result"),
        ('{"schema": "fusion-bench", "schema_version": 4}', "is not a valid fusion-bench result"),
    ],
)
def test_files_that_are_no_result_are_refused(
    tmp_path: Path, refused: Callable[..., str], content: str | None, message: str
) -> None:
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    error = refused(cli.main, "compare", file, file)
    assert message in error
    assert "expected a file that fusion-bench --json wrote" in error


def test_committed_results_of_an_older_schema_are_refused(refused: Callable[..., str]) -> None:
    file = ROOT / "benchmarks" / "results" / "fusion_bench_3b_cpu.json"
    error = refused(cli.main, "compare", file, file)
    assert "has schema version 3; this fusion-edge reads version 4 only. Measure again" in error
