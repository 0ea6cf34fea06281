"""Schema of the JSON that ``python -m fusion_edge.benchmarks.peers --json`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.latency.result_file import ResultFile, Schema, read_result_file
from fusion_edge.benchmarks.latency.statistics import Summary

SCHEMA = Schema("fusion-edge peers", 2, "python -m fusion_edge.benchmarks.peers --json")


@dataclass(frozen=True)
class ContestantResult:
    """Measurements of one contestant with one setting, in the order of the rounds."""

    label: str
    """Label that all settings of an engine and a model share."""
    setting: str
    """Name of the setting; empty if the engine has one only."""
    runner: str
    model: str
    """Name of the model's file or folder, without its path."""
    settings: Mapping[str, Any]
    """Options passed to the engine."""
    versions: Mapping[str, str]
    figures: Mapping[str, Summary]
    """Fields of ``LlmFigures`` or ``VisionFigures`` (``runners/``), one value per round."""
    load_average: tuple[float, ...]
    """Load average of the last minute before each round."""
    disturbance: tuple[float, ...]
    """Processor seconds of all other processes during each round, the hypervisor included."""


@dataclass(frozen=True)
class PeersResult(ResultFile):
    """The whole file."""

    workload: Mapping[str, Any]
    contestants: Mapping[str, ContestantResult]
    """By label and setting. Settings that lead in no phase have the first round only."""


def read_result(path: Path) -> PeersResult:
    """Read a result. Raises :class:`FusionError` for any other file or schema version."""
    return read_result_file(path, PeersResult, SCHEMA)
