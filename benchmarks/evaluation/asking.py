"""Ask a model the questions of samples, and time the stages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from fusion_edge.benchmarks.evaluation.result import IMAGE_DECODE, TOTAL, TTFT, ModelInfo, Settings
from fusion_edge.benchmarks.evaluation.teacher_forcing import (
    Floats,
    LogProbabilityFile,
    ReferenceAnswer,
    force,
    generate,
)
from fusion_edge.runtime import Answer, Choice, DeadlineExceeded, Fusion, Sampling
from fusion_edge.runtime.requests import PreparedQuestion
from fusion_edge.runtime.samples import Sample

MAX_NEW_TOKENS = 64
DECODE = "decode"


@dataclass(frozen=True)
class Response:
    """A model's answer to one sample."""

    text: str
    token_ids: tuple[int, ...]
    """Empty for a choice."""
    finish_reason: str
    confidence: float | None
    """None if the deadline came first."""
    probabilities: Mapping[str, float]
    """Of the choices; empty for a generated answer, and if the deadline came first."""
    seconds: Mapping[str, float]
    """By stage."""


def settings(
    fusion: Fusion,
    query_length: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    choices: tuple[str, ...] = (),
    deadline: float | None = None,
    threads: int | None = None,
) -> Settings:
    """Return the settings of an opened model. Raise :class:`UsageError` for a query length that it does not offer."""
    return Settings(
        query_length=fusion.query_length(query_length),
        image_tokens=fusion.manifest.image_side**2,
        max_new_tokens=max_new_tokens,
        choices=choices,
        deadline=deadline,
        threads=threads,
    )


def model_info(fusion: Fusion) -> ModelInfo:
    """Describe an opened model."""
    manifest = fusion.manifest
    return ModelInfo(manifest.source, manifest.target, manifest.precision, manifest.size, fusion.device.name)


class Questioner:
    """Asks a model one sample after another."""

    def __init__(self, fusion: Fusion, settings: Settings) -> None:
        self._fusion = fusion
        self._settings = settings
        self._sampling = Sampling(max_new_tokens=settings.max_new_tokens)

    def respond(self, sample: Sample) -> Response:
        """Answer the question of a sample."""
        started = time.perf_counter()
        picture = sample.load()
        decoded = time.perf_counter() - started
        try:
            given = self._ask(picture, sample.question)
        except DeadlineExceeded as late:
            given = late.partial
        total = time.perf_counter() - started
        stages = {stage: milliseconds / 1000 for stage, milliseconds in given.timings_ms.items()}
        seconds = {IMAGE_DECODE: decoded, **stages}
        if isinstance(given, Choice):
            probability = given.probabilities[given.text]
            return Response(given.text, (), "stop", probability, given.probabilities, seconds | {TOTAL: total})
        if given.token_ids:
            seconds[TTFT] = decoded + sum(time for stage, time in stages.items() if stage != DECODE)
        confidence = given.confidence if given.token_ids or given.is_complete else None
        return Response(given.text, given.token_ids, given.finish_reason, confidence, {}, seconds | {TOTAL: total})

    def generate(self, sample: Sample, kept: LogProbabilityFile) -> ReferenceAnswer:
        """Answer as a reference, and keep the log-probabilities."""
        return generate(self._fusion, self._prepare(sample), kept)

    def force(self, sample: Sample, tokens: Sequence[int], count: int) -> Floats:
        """Return the log-probabilities ``[count,V]`` of the first token and of each one that follows ``tokens``."""
        return force(self._fusion, self._prepare(sample), tokens, count)

    def _prepare(self, sample: Sample) -> PreparedQuestion:
        return self._fusion.pipeline.prepare(
            sample.load(), sample.question, sampling=self._sampling, query_length=self._settings.query_length
        )

    def _ask(self, picture: Image.Image, question: str) -> Answer | Choice:
        length, deadline = self._settings.query_length, self._settings.deadline
        if choices := self._settings.choices:
            return self._fusion.choose(picture, question, choices, query_length=length, deadline=deadline)
        return self._fusion.answer(picture, question, sampling=self._sampling, query_length=length, deadline=deadline)
