"""OpenVINO beside us: with all instructions, and with both held to the instruction set of each other tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.cpu_acceptance.goals import Goal
from fusion_edge.benchmarks.peers import llm, vision
from fusion_edge.benchmarks.peers.harness import (
    Contestant,
    PeerComparison,
    best_titles,
    peers_result,
    run_rounds,
    table,
)
from fusion_edge.benchmarks.peers.result import PeersResult
from fusion_edge.benchmarks.peers.runners.instruction_sets import INSTRUCTION_SETS
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

OURS, PEER = "fusion-edge", "OpenVINO"
SPEEDUPS: Mapping[str, Mapping[str, float]] = {
    "AMX": {"both": 4 / 3, "prefill": 3, "decode": 1.3},
    "AVX-512 VNNI": {"both": 1},
    "AVX-VNNI": {"both": 1, "prefill": 1.3, "decode": 1.1},
    "AVX2": {"both": 1, "prefill": 1.3, "decode": 1.1},
}
"""Goals by tier and phase: how many times as fast as OpenVINO at its best setting. ``both``: the five crops."""
FULL: Mapping[str, Mapping[str, int]] = {
    "vision": {},
    "llm": {"prompt": 900, "context": 916, "capacity": 1024},
}
SHORT: Mapping[str, Mapping[str, int]] = {
    "vision": {"crops": 1},
    "llm": {"prompt": 256, "context": 264, "steps": 16, "capacity": 512},
}
"""Workloads with an instruction set, which take several times as long: only their ratios count."""


@dataclass(frozen=True)
class PeerModels:
    """Models to compare."""

    bundle: Path
    llm: Path | None
    """Folder written by optimum-intel."""
    vision: Path | None
    """Folder written by ``peers.export_vision``."""
    python: str
    """Interpreter of an environment with OpenVINO."""


@dataclass(frozen=True)
class Comparison:
    """Result of one comparison on one tier."""

    kind: str
    tier: str
    result: PeersResult

    @property
    def columns(self) -> PeerComparison:
        """Return the kind of comparison."""
        return KINDS[self.kind]


KINDS = {"vision": vision.COMPARISON, "llm": llm.COMPARISON}


def measure(models: PeerModels, threads: int, rounds: int) -> Iterator[Comparison]:
    """Run every comparison that has a goal and a model, and yield each as it ends.

    Raises:
        FusionError: A runner fails; its output says why.
    """
    paths = {"vision": models.vision, "llm": models.llm}
    fastest, *held = reversed(cpu_kernels.tiers())
    sets = {chosen.tier: isa for isa, chosen in INSTRUCTION_SETS.items()}
    runs: list[tuple[str, str | None]] = [(fastest, None), *((tier, sets[tier]) for tier in held if tier in sets)]
    for tier, isa in runs:
        for kind, path in paths.items():
            phases = {column.title for column in KINDS[kind].columns if column.is_phase}
            if path is None or not phases & SPEEDUPS.get(tier, {}).keys():
                continue
            sizes: dict[str, Any] = dict((SHORT if isa else FULL)[kind])
            work = KINDS[kind].workload(threads=threads, isa=isa, **sizes)
            contestants = _contestants(kind, models, path, isa)
            ran = run_rounds(contestants, work, 1 if isa else rounds, KINDS[kind].columns)
            yield Comparison(kind, tier, peers_result(contestants, work, ran))


def _contestants(kind: str, models: PeerModels, peer: Path, isa: str | None) -> list[Contestant]:
    runners = KINDS[kind].runners
    theirs = runners["openvino"]
    settings = theirs.tried(isa)
    return [
        Contestant(OURS, runners["bundle"], models.bundle),
        *(Contestant(PEER, theirs, peer, models.python, setting) for setting in settings),
    ]


def goals(comparisons: list[Comparison]) -> Iterator[Goal]:
    """Yield the goal of every phase."""
    for one in comparisons:
        columns = one.columns.columns
        ours, theirs = (best_titles(one.result, label, columns) for label in (OURS, PEER))
        for column, our, their in zip(columns, ours, theirs, strict=True):
            limit = SPEEDUPS[one.tier].get(column.title) if column.is_phase else None
            if limit is not None:
                own, best = (one.result.contestants[title].figures[column.field].p50 for title in (our, their))
                name = "vision of an image" if one.kind == "vision" else column.title
                yield Goal(f"{name}, {one.tier}, speedup over {PEER}", column.speedup(own, best), limit, "")


def text(comparison: Comparison) -> str:
    """Format a comparison."""
    return f"{comparison.kind}, {comparison.tier}\n{table(comparison.result, comparison.columns.columns)}"
