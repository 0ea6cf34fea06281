"""``benchmarks/cpu_acceptance``: goals, tables, and a run with a tiny bundle and a fake peer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.cpu_kernel_switches import needs_cpu_kernels

from fusion_edge.benchmarks import cpu_kernels
from fusion_edge.benchmarks.cpu_acceptance import __main__ as command
from fusion_edge.benchmarks.cpu_acceptance import comparisons, kernels, stages
from fusion_edge.benchmarks.cpu_acceptance.goals import Goal, goal_table
from fusion_edge.benchmarks.cpu_acceptance.kernels import KernelResult, Kernels
from fusion_edge.benchmarks.cpu_acceptance.stages import StageResult
from fusion_edge.benchmarks.latency import peaks
from fusion_edge.benchmarks.peers import harness
from fusion_edge.benchmarks.peers.harness import Contestant, Round, WorkerReport
from fusion_edge.export import cli
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels as runtime_kernels
from fusion_edge.runtime.errors import FusionError

ORT, VNNI, AMX = cpu_kernels.ONNX_RUNTIME, "AVX-512 VNNI", "AMX"


def kernel(name: str, theirs: float, vnni: float, amx: float) -> KernelResult:
    """Result of a layer of 10^9 operations."""
    seconds = {ORT: theirs, VNNI: vnni, AMX: amx}
    return KernelResult(name, "GOP/s", seconds, {tier: 1 / time for tier, time in seconds.items()})


KERNELS = Kernels(
    gemm=kernel("gemm", 0.01, 0.002, 0.0005),
    small=[kernel("two rows", 0.01, 0.02, 0.005), kernel("four rows", 0.01, 0.01, 0.008)],
    integer=[kernel("mlp", 0.01, 0.005, 0.002)],
    attention=[kernel("attention", 0.02, 0.01, 0.004)],
    gemv=kernel("gemv", 0.2, 0.1, 0.05),
    read_rate=25.0,
)
STAGE = StageResult(
    tier=AMX,
    threads=2,
    prompt_tokens=923,
    vision=1.5,
    alignment=0.5,
    prefill=2.0,
    first_token=4.0,
    decode_step=0.08,
    bandwidth_share=0.9,
)


def test_a_goal_is_met_at_its_limit() -> None:
    at_least = [Goal("rate", figure, 2000, "GOP/s") for figure in (1999, 2000, 4000)]
    assert [(goal.is_met, goal.ratio) for goal in at_least] == [(False, 0.9995), (True, 1.0), (True, 2.0)]
    at_most = [Goal("time", figure, 5, "s", is_upper=True) for figure in (5.1, 5, 2.5)]
    assert [goal.is_met for goal in at_most] == [False, True, True]
    assert at_most[2].ratio == 2.0


def test_table_of_goals() -> None:
    goals = [Goal("rate", 500.0, 2000, "GOP/s"), Goal("time", 4.0, 5, "s", is_upper=True), Goal("share", 0.9, 0.85, "")]
    lines = [line.split() for line in goal_table(goals).splitlines()]
    assert lines[1] == ["rate", ">=", "2000", "GOP/s", "500", "GOP/s", "0.25", "NOT", "MET"]
    assert lines[2] == ["time", "<=", "5", "s", "4", "s", "0.80", "met"]
    assert lines[3] == ["share", ">=", "0.85", "0.90", "1.06", "met"]


def test_goals_of_kernels() -> None:
    found = {goal.name: (round(goal.figure, 3), goal.limit) for goal in kernels.goals(KERNELS)}
    assert found == {
        "gemm, AMX": (2000, 2000),
        "attention, AMX": (250, 500),
        "two rows, AVX-512 VNNI, speedup over ONNX Runtime": (0.5, 1),
        "four rows, AMX, speedup over ONNX Runtime": (1.25, 1),
        "gemv, AMX, share of the bandwidth read": (0.8, 0.85),
    }


def test_table_of_kernels() -> None:
    rows = kernels.rows(KERNELS)
    assert rows[0] == ("layer, one core", ORT, VNNI, AMX, "", "speedup")
    assert rows[1] == ("gemm", "100.0", "500.0", "2000.0", "GOP/s", "20.00")
    assert [row[0] for row in rows[2:]] == ["two rows", "four rows", "mlp", "attention", "gemv", "read, one thread"]
    assert rows[-1] == ("read, one thread", "", "", "25.0", "GB/s", "")
    assert len({len(row) for row in rows}) == 1


def test_goals_and_table_of_stages() -> None:
    slower = StageResult(**{**vars(STAGE), "tier": VNNI, "first_token": 14.0})
    one_thread = StageResult(**{**vars(STAGE), "threads": 1, "bandwidth_share": 0.1})
    results = [slower, STAGE, one_thread]
    assert [(goal.name, goal.figure, goal.is_met) for goal in stages.goals(results)] == [
        ("first question to first token, AMX, 2 threads", 4.0, True),
        ("decode, AMX, 2 threads, share of the bandwidth read", 0.9, True),
    ]
    without_amx = [goal.name for goal in stages.goals([slower])]
    assert without_amx == ["decode, AVX-512 VNNI, 2 threads, share of the bandwidth read"]
    expected = (VNNI, "2", "1.50 s", "0.50 s", "2.00 s", "14.00 s", "12.5 tokens/s", "90%")
    assert stages.rows(results)[1] == expected


def test_numbers_of_threads() -> None:
    assert [stages._thread_counts(count) for count in (1, 2, 4, 6)] == [[1], [2, 1], [4, 2, 1], [6, 4, 2, 1]]


def test_best_of_rounds() -> None:
    other = StageResult(**{**vars(STAGE), "vision": 1.0, "prefill": 3.0, "decode_step": 0.1, "bandwidth_share": 0.95})
    best = stages._best([STAGE, other])
    assert (best.vision, best.prefill, best.decode_step, best.bandwidth_share) == (1.0, 2.0, 0.08, 0.95)


class Peer:
    """Stands in for the workers: OpenVINO takes 3 s for everything, we take 2 s, or 4 s with AVX2."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, str | None]] = []

    def __call__(self, contestant: Contestant, workload: Any) -> Round:
        self.runs.append((contestant.title, workload.isa))
        seconds = 3.0 if contestant.label == comparisons.PEER else 4.0 if workload.isa == "avx2" else 2.0
        names = ("prefill_seconds", "global_seconds", "local_seconds", "image_seconds", "load_seconds")
        figures = dict.fromkeys(names, seconds) | {"decode_tokens_per_second": 12 / seconds}
        return Round(WorkerReport({**figures, "memory": 1.0, "peak_memory": 1.0}, {}, {}), 0.0, 0.0)


def compare(
    monkeypatch: pytest.MonkeyPatch, tiers: Sequence[str], **models: Path | None
) -> tuple[Peer, dict[str, Any]]:
    """Compare with models of the peer; return its runs, and the goals' figures and limits."""
    peer = Peer()
    monkeypatch.setattr(harness, "run_worker", peer)
    monkeypatch.setattr(runtime_kernels, "tiers", lambda: tuple(tiers))
    given = {"llm": None, "vision": None, **models}
    measured = list(comparisons.measure(comparisons.PeerModels(Path("ours"), **given, python="python"), 2, 2))
    return peer, {goal.name: (goal.figure, goal.limit) for goal in comparisons.goals(measured)}


def test_fastest_tier_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, goals = compare(monkeypatch, ["AVX2", "AVX-VNNI", VNNI, AMX], vision=Path("peer"))
    assert peer.runs == [
        *[("fusion-edge", None), ("OpenVINO: bf16", None), ("OpenVINO: f32", None)],
        *[("fusion-edge", None), ("OpenVINO: bf16", None)],  # the better setting again
        *[("fusion-edge", "avx512_vnni"), ("OpenVINO: f32", "avx512_vnni")],
        *[("fusion-edge", "avx_vnni"), ("OpenVINO: f32", "avx_vnni")],
        *[("fusion-edge", "avx2"), ("OpenVINO: f32", "avx2")],
    ]
    assert goals == {
        "vision of an image, AMX, speedup over OpenVINO": (1.5, 4 / 3),
        "vision of an image, AVX-512 VNNI, speedup over OpenVINO": (1.5, 1),
        "vision of an image, AVX-VNNI, speedup over OpenVINO": (1.5, 1),
        "vision of an image, AVX2, speedup over OpenVINO": (0.75, 1),
    }


def test_only_tiers_with_a_goal_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, goals = compare(monkeypatch, ["AVX2", VNNI, AMX], llm=Path("peer"))
    assert {isa for _, isa in peer.runs} == {None, "avx2"}  # no goal of the LLM with AVX-512 VNNI
    assert goals == {
        "prefill, AMX, speedup over OpenVINO": (1.5, 3),
        "decode, AMX, speedup over OpenVINO": (1.5, 1.3),
        "prefill, AVX2, speedup over OpenVINO": (0.75, 1.3),
        "decode, AVX2, speedup over OpenVINO": (0.75, 1.1),
    }
    peer, goals = compare(monkeypatch, [AMX])  # no models
    assert (peer.runs, goals) == ([], {})


def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "QUIET", 0)
    monkeypatch.setattr(stages, "STEPS", 2)


@needs_cpu_kernels
def test_one_command_measures_everything(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "run_worker", Peer())
    for name, size in {"ROUNDS": 1, "DECODE_LAYERS": 1, "PROMPT": 20, "VISION_CROPS": 1, "VISION_ROWS": 16}.items():
        monkeypatch.setattr(cpu_kernels, name, size)
    for name, sizes in {"OUTPUTS": 256, "INPUTS": 256, "SMALL_ROWS": (2, 3)}.items():
        monkeypatch.setattr(kernels, name, sizes)
    small_reads(monkeypatch)
    file = tmp_path / "result.json"
    models = [f"--openvino-llm={tmp_path}", f"--openvino-vision={tmp_path}"]
    assert command.main([str(tiny_bundle), "--rounds=1", f"--json={file}", *models]) == 0
    result = json.loads(file.read_text())
    assert result["command"] == "python -m fusion_edge.benchmarks.cpu_acceptance BUNDLE --rounds 1"
    tiers = list(runtime_kernels.tiers())
    assert list(result["kernels"]["gemm"]["rates"]) == [ORT, *tiers]
    assert [one["tier"] for one in result["stages"]][: len(tiers)] == tiers
    assert min(one["first_token"] for one in result["stages"]) > 0
    assert {one["kind"] for one in result["peers"]} == {"vision", "llm"}
    assert {goal["is_met"] for goal in result["goals"]} <= {True, False}
    output = capsys.readouterr().out
    assert all(goal["name"] in output for goal in result["goals"])
    assert str(tmp_path) not in file.read_text()


@needs_cpu_kernels
def test_parts(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small_reads(monkeypatch)
    assert command.main([str(tiny_bundle), "--rounds=1", "--only=stages"]) == 0
    header, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["tier", "threads", "vision"]


@needs_cpu_kernels
def test_a_peer_that_fails_takes_no_other_figure_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    peer = Peer()

    def run(contestant: Contestant, workload: Any) -> Round:
        if workload.isa is not None:
            raise FusionError("OpenVINO crashed.")
        return peer(contestant, workload)

    monkeypatch.setattr(harness, "run_worker", run)
    monkeypatch.setattr(runtime_kernels, "tiers", lambda: ("AVX2", AMX))
    file = tmp_path / "result.json"
    options = ["--only=peers", "--rounds=1", f"--json={file}", f"--openvino-vision={tmp_path}"]
    assert refused(command.main, "bundle", *options) == "error: OpenVINO crashed.\n"
    result = json.loads(file.read_text())
    assert [(one["kind"], one["tier"]) for one in result["peers"]] == [("vision", AMX)]
    assert [goal["name"] for goal in result["goals"]] == ["vision of an image, AMX, speedup over OpenVINO"]


@needs_cpu_kernels
def test_a_bundle_that_our_kernels_cannot_run(
    tiny_checkpoint: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    bundle = tmp_path / "float"
    assert cli.main([str(tiny_checkpoint), "-o", str(bundle), "--fp32"]) == 0
    assert f"The CPU kernels cannot run {bundle}. Their linear layers compute in int8" in refused(
        command.main, bundle, "--only=stages"
    )


def test_without_kernels_there_is_nothing_to_accept(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_kernels, "library", lambda: None)
    assert "The CPU kernels are not built" in refused(command.main, tmp_path)
