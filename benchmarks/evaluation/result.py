"""Schema of the JSON that ``fusion-eval --json`` prints.

Every field is documented here. docs/evaluate.md explains how to read the figures. A change of a field's name or meaning
raises the version of :data:`SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusion_edge.benchmarks.evaluation.calibration_error import Bin
from fusion_edge.benchmarks.evaluation.scores import Share
from fusion_edge.benchmarks.latency.result_file import ResultFile, Schema

SCHEMA = Schema("fusion-eval", 1, "fusion-eval --json")

EXACT, CONTAINS, CHOICE = "exact", "contains", "choice"
"""Ways to judge an answer: the same text; the expected words within it; the same choice."""
IMAGE_DECODE, LOOK, TTFT, TOTAL = "image decode", "look", "TTFT", "total"
"""Measures beside the stages of :attr:`Answer.timings_ms`: reading the image, a scene's look at it, time to first
token, the whole answer. The last two include the first two."""


@dataclass(frozen=True)
class ModelInfo:
    """A model that answered."""

    source: str
    """Name of the checkpoint."""
    target: str
    precision: str
    size: int
    """Bytes of the bundle; 0 for a checkpoint."""
    device: str


@dataclass(frozen=True)
class Settings:
    """How every question was asked."""

    query_length: int
    image_tokens: int
    max_new_tokens: int
    guide: str | None
    """Guide of the scenes; None where each question is its own guide."""
    choices: tuple[str, ...]
    """Choices that were scored; empty for generated answers."""
    deadline: float | None
    """Seconds."""
    threads: int | None


@dataclass(frozen=True)
class Percentiles:
    """Seconds of repeated runs."""

    count: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class CaseComparison:
    """One answer against the reference's."""

    answer: str
    """The reference's answer."""
    is_same: bool
    """Whether both models generated the same tokens, or chose the same choice."""
    same_tokens: int
    """Positions at which both models have the same most likely token, given the reference's tokens before it."""
    kl_divergences: tuple[float, ...]
    """KL(reference || model) in nats by position, given the reference's tokens before it. With choices: one value, over
    their probabilities."""


@dataclass(frozen=True)
class CaseResult:
    """One sample."""

    image: str
    question: str
    expected: str
    answer: str
    finish_reason: str
    """As :attr:`Answer.finish_reason`; ``stop`` for a choice."""
    is_right: Mapping[str, bool]
    """By way to judge."""
    confidence: float | None
    """As :attr:`Answer.confidence`, or the probability of the choice; None if the deadline came before an answer."""
    is_follow_up: bool
    """Whether the sample before has the same image, whose features are cached."""
    seconds: Mapping[str, float]
    """By stage."""
    comparison: CaseComparison | None
    """None without a reference, and if the deadline came before a choice."""


@dataclass(frozen=True)
class Comparison:
    """All answers against the reference's."""

    reference: ModelInfo
    same_answer: Share
    same_token: Share
    """Over all positions of the reference's answers."""
    kl_first_token: float
    """Mean of KL(reference || model) at the first token, nats."""
    kl_per_position: float
    """Mean over all positions, nats."""


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy."""

    error: float
    """Expected calibration error."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class EvalResult(ResultFile):
    """The whole file."""

    command: str
    model: ModelInfo
    data: str
    """Name of the file of samples."""
    settings: Settings
    judged_by: str
    """Way to judge an answer that calibration and ``--min-accuracy`` use."""
    accuracy: Mapping[str, Share]
    """Share of right answers by way to judge."""
    late: int
    """Answers that the deadline ended."""
    calibration: Calibration
    first: Mapping[str, Percentiles]
    """By stage: questions about a new image."""
    follow_up: Mapping[str, Percentiles]
    """By stage: questions about the image of the sample before."""
    comparison: Comparison | None
    cases: tuple[CaseResult, ...]
