"""Ask a model the questions of samples, and time the stages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fusion_edge.benchmarks.evaluation.result import IMAGE_DECODE, LOOK, TOTAL, TTFT, ModelInfo, Settings
from fusion_edge.benchmarks.evaluation.teacher_forcing import (
    Floats,
    LogProbabilityFile,
    ReferenceAnswer,
    force,
    generate,
)
from fusion_edge.runtime import Answer, Choice, DeadlineExceeded, Fusion, Sampling, Scene
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
    guide: str | None = None,
    choices: tuple[str, ...] = (),
    deadline: float | None = None,
    threads: int | None = None,
) -> Settings:
    """Return the settings of an opened model. Raise :class:`UsageError` for a query length that it does not offer."""
    return Settings(
        query_length=fusion.query_length(query_length),
        image_tokens=fusion.manifest.image_side**2,
        max_new_tokens=max_new_tokens,
        guide=guide,
        choices=choices,
        deadline=deadline,
        threads=threads,
    )


def model_info(fusion: Fusion) -> ModelInfo:
    """Describe an opened model."""
    manifest = fusion.manifest
    return ModelInfo(manifest.source, manifest.target, manifest.precision, manifest.size, fusion.device.name)


class Questioner:
    """Asks a model one sample after another. With a guide, samples of one image in a row share a scene."""

    def __init__(self, fusion: Fusion, settings: Settings) -> None:
        self._fusion = fusion
        self._settings = settings
        self._sampling = Sampling(max_new_tokens=settings.max_new_tokens)
        self._scene: Scene | None = None
        self._scene_of: Path | None = None

    def respond(self, sample: Sample) -> Response:
        """Answer the question of a sample. A deadline counts from the question on, after a look at the image."""
        subject, seconds = self._see(sample)
        before, started = sum(seconds.values()), time.perf_counter()
        try:
            given = self._ask(subject, sample.question)
        except DeadlineExceeded as late:
            given = late.partial
        total = before + time.perf_counter() - started
        seconds |= {stage: milliseconds / 1000 for stage, milliseconds in given.timings_ms.items()}
        if isinstance(given, Choice):
            probability = given.probabilities[given.text]
            return Response(given.text, (), "stop", probability, given.probabilities, seconds | {TOTAL: total})
        if given.token_ids:
            seconds[TTFT] = sum(time for stage, time in seconds.items() if stage != DECODE)
        confidence = given.confidence if given.token_ids or given.is_complete else None
        return Response(given.text, given.token_ids, given.finish_reason, confidence, {}, seconds | {TOTAL: total})

    def generate(self, sample: Sample, kept: LogProbabilityFile) -> ReferenceAnswer:
        """Answer as a reference, and keep the log-probabilities."""
        return generate(self._fusion, self._prepare(sample), kept)

    def force(self, sample: Sample, tokens: Sequence[int], count: int) -> Floats:
        """Return the log-probabilities ``[count,V]`` of the first token and of each one that follows ``tokens``."""
        return force(self._fusion, self._prepare(sample), tokens, count)

    def _see(self, sample: Sample) -> tuple[Image.Image | Scene, dict[str, float]]:
        """Return the picture of a sample, or its scene if there is a guide, and the seconds that this took by stage."""
        guide = self._settings.guide
        if guide is not None and self._scene is not None and self._scene_of == sample.image:
            return self._scene, {}
        started = time.perf_counter()
        picture = sample.load()
        decoded = time.perf_counter()
        if guide is None:
            return picture, {IMAGE_DECODE: decoded - started}
        self._scene = self._fusion.look(picture, guide, query_length=self._settings.query_length)
        self._scene_of = sample.image
        return self._scene, {IMAGE_DECODE: decoded - started, LOOK: time.perf_counter() - decoded}

    def _prepare(self, sample: Sample) -> PreparedQuestion:
        subject, _ = self._see(sample)
        if isinstance(subject, Scene):
            return subject.prepare(sample.question, sampling=self._sampling)
        length = self._settings.query_length
        return self._fusion.pipeline.prepare(subject, sample.question, sampling=self._sampling, query_length=length)

    def _ask(self, subject: Image.Image | Scene, question: str) -> Answer | Choice:
        length, deadline, choices = self._settings.query_length, self._settings.deadline, self._settings.choices
        if isinstance(subject, Scene):
            if choices:
                return subject.choose(question, choices, deadline=deadline)
            return subject.answer(question, sampling=self._sampling, deadline=deadline)
        if choices:
            return self._fusion.choose(subject, question, choices, query_length=length, deadline=deadline)
        return self._fusion.answer(subject, question, sampling=self._sampling, query_length=length, deadline=deadline)
