"""Schema of the JSON that ``fusion-bench --json`` prints.

Every field is documented here. docs/fusion-bench.md explains how to read the figures. A change of a field's name or
meaning raises the version of :data:`SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusion_edge.benchmarks.latency.machine.energy import EnergyUse
from fusion_edge.benchmarks.latency.machine.memory import MemoryUse
from fusion_edge.benchmarks.latency.result_file import ResultFile, Schema, read_result_file
from fusion_edge.benchmarks.latency.statistics import Summary
from fusion_edge.runtime.stages import (
    ALIGNMENT,
    DECODE_STEP,
    ENCODE_GLOBAL,
    ENCODE_LOCAL,
    PREFILL,
    PREPROCESS,
    SAMPLING,
)

SCHEMA = Schema("fusion-bench", 4, "fusion-bench --json")

IMAGE_DECODE = "image decode"
STAGES = (IMAGE_DECODE, PREPROCESS, ENCODE_GLOBAL, ALIGNMENT, ENCODE_LOCAL, PREFILL, DECODE_STEP, SAMPLING)
"""Stages of an answer in the order of their first run."""


@dataclass(frozen=True)
class BundleInfo:
    """Bundle that ran."""

    source: str
    """Name of the exported checkpoint."""
    target: str
    precision: str
    size: int
    digest: str
    """SHA-256 of ``bundle.json``."""
    max_context: int


@dataclass(frozen=True)
class Peaks:
    """Rooflines of a device, measured by a short probe (peaks.py).

    A CPU runs the probe with the largest number of threads of all cases.
    """

    bandwidth: float | None
    """Bytes per second. CPU: bytes that all threads read between the cases' decode steps. GPU: bytes that a copy reads
    and writes."""
    compute: float | None
    """Multiply-adds per second of a GEMM. CPU: the fastest of INT4 and INT8. GPU: float16."""
    not_measured: Mapping[str, str]
    """Reason for each None, by field name."""


@dataclass(frozen=True)
class Case:
    """One combination of options."""

    device: str
    threads: int
    query_length: int
    image_tokens: int
    prompt_tokens: int
    """Tokens of the prompt: text, image tokens and latents."""
    new_tokens: int
    context: int
    """Tokens in the KV cache at the first timed decode step."""


@dataclass(frozen=True)
class Utilization:
    """Work of a stage, and the share of its roofline that the stage reaches."""

    work: int
    """Bytes that a decode step reads, or multiply-adds of a prefill."""
    roofline_seconds: float | None
    """Seconds of that work at the roofline; None without a roofline. The bandwidth of a CPU is the median of those read
    between this case's own decode steps."""
    share: float | None
    """``roofline_seconds`` over the stage's median: 1 is the whole roofline."""


@dataclass(frozen=True)
class RooflineUse:
    """Stages with a known roofline."""

    decode: Utilization
    """Against the bandwidth."""
    prefill: Utilization
    """Against the compute throughput."""


@dataclass(frozen=True)
class CaseResult:
    """Measurements of one case."""

    case: Case
    remark: str | None
    """Reason why the device runs slower than it could, such as missing CPU kernels."""
    load_seconds: float
    """Seconds of one load, from disk or from the page cache."""
    stages: Mapping[str, Summary]
    """Seconds by stage, in the order of :data:`STAGES`; absent stages do not run in this case."""
    ttft: Summary
    """Time to first token of the first question about an image, from the image's file on."""
    followup_ttft: Summary
    """Time to first token of a follow-up question about the same image, from the decoded image on."""
    decode_tokens_per_second: float
    """1 over the sum of the medians of a decode step and of sampling."""
    answer: Summary
    """Seconds of a first question from the image's file to its last token: TTFT and ``new_tokens`` decode steps."""
    jitter: float
    """99th percentile of a decode step over its median, minus 1."""
    is_noisy: bool
    """Whether the error of a decode step, of the TTFT or of the follow-up TTFT exceeds 3%."""
    roofline: RooflineUse
    memory: MemoryUse
    """Of the process."""
    device_memory: MemoryUse | None
    """Of the GPU; None without one. A Jetson reports the memory of the whole machine, this process included."""
    energy: EnergyUse | None
    """None if the machine reports no energy, or if the context has no room for five seconds of decode steps."""


@dataclass(frozen=True)
class BenchResult(ResultFile):
    """The whole file."""

    command: str
    bundle: BundleInfo
    peaks: Mapping[str, Peaks]
    """By device."""
    cases: tuple[CaseResult, ...]


def read_result(path: Path) -> BenchResult:
    """Read a result of ``fusion-bench``. Raises :class:`FusionError` for any other file or schema version."""
    return read_result_file(path, BenchResult, SCHEMA)
