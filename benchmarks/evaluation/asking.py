"""Ask a model the questions of samples, and time the stages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from fusion_edge.benchmarks.evaluation.result import IMAGE_DECODE, TOTAL, TTFT, Settings
from fusion_edge.runtime import Fusion, Sampling
from fusion_edge.runtime.errors import DeadlineExceeded
from fusion_edge.runtime.samples import Sample

MAX_NEW_TOKENS = 64
DECODE = "decode"


@dataclass(frozen=True)
class Response:
    """A model's answer to one sample."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    confidence: float | None
    """None if the deadline came first."""
    seconds: Mapping[str, float]
    """By stage."""


def settings(
    fusion: Fusion,
    query_length: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    deadline: float | None = None,
    threads: int | None = None,
) -> Settings:
    """Return the settings of an opened model. Raise :class:`UsageError` for a query length that it does not offer."""
    return Settings(
        query_length=fusion.query_length(query_length),
        image_tokens=fusion.manifest.image_side**2,
        max_new_tokens=max_new_tokens,
        deadline=deadline,
        threads=threads,
    )


def respond(fusion: Fusion, sample: Sample, settings: Settings) -> Response:
    """Answer the question of a sample."""
    started = time.perf_counter()
    picture = sample.load()
    decoded = time.perf_counter() - started
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    try:
        answer = fusion.answer(
            picture,
            sample.question,
            sampling=sampling,
            query_length=settings.query_length,
            deadline=settings.deadline,
        )
    except DeadlineExceeded as late:
        answer = late.partial
    total = time.perf_counter() - started
    stages = {stage: milliseconds / 1000 for stage, milliseconds in answer.timings_ms.items()}
    first = decoded + sum(seconds for stage, seconds in stages.items() if stage != DECODE)
    seconds = {IMAGE_DECODE: decoded, **stages, TTFT: first, TOTAL: total}
    return Response(answer.text, answer.token_ids, answer.finish_reason, answer.confidence, seconds)
