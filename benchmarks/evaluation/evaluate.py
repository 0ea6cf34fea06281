"""Ask a model the questions of samples, and compare its answers with the expected ones and with a reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from fusion_edge.benchmarks.evaluation.asking import Response, respond
from fusion_edge.benchmarks.evaluation.reference import (
    LogProbabilities,
    ReferenceAnswer,
    check_comparable,
    divergences,
    force,
    generate,
    vocabulary,
)
from fusion_edge.benchmarks.evaluation.result import (
    CONTAINS,
    EXACT,
    CaseComparison,
    CaseResult,
    ModelInfo,
    Settings,
)
from fusion_edge.benchmarks.evaluation.scores import contains, is_exact
from fusion_edge.runtime import Fusion, Sampling
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.requests import PreparedQuestion
from fusion_edge.runtime.samples import Sample, check_images, read_lines, samples_file
from fusion_edge.runtime.system.progress import Progress

OpenModel = Callable[[], AbstractContextManager[Fusion]]
"""Opens a model; leaving the context closes it."""
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """A model's answers, and what they were compared with."""

    model: ModelInfo
    reference: ModelInfo | None
    settings: Settings
    cases: tuple[CaseResult, ...]


def answered_samples(data: Path, limit: int | None = None) -> list[Sample]:
    """Return the first ``limit`` samples of a JSONL file, or of the one in a folder.

    Raises :class:`FusionError` for a file without samples, a sample without an answer, and unreadable images.
    """
    file = samples_file(data)
    samples = [] if file is None else read_lines(file)[:limit]
    if not samples:
        raise FusionError(
            f'{data} has no samples; expected lines of {{"image": PATH, "question": TEXT, "answer": TEXT}}.'
        )
    for number, sample in enumerate(samples, 1):
        if not (sample.answer or "").strip():
            raise FusionError(f"Sample {number} of {data} has no answer, which an evaluation needs; add it.")
    check_images(data, samples)
    return samples


def evaluate(
    open_model: OpenModel,
    samples: Sequence[Sample],
    settings_of: Callable[[Fusion], Settings],
    open_reference: OpenModel | None = None,
) -> Evaluation:
    """Ask a model every question; first a reference, if there is one. Only one model is open at a time.

    ``settings_of`` returns the settings for the opened model. Raises :class:`UsageError` for a reference of another
    model, and :class:`FusionError` for a question that does not fit the context.
    """
    with open_model() as fusion:
        model, settings, words = _info(fusion), settings_of(fusion), vocabulary(fusion)
        if open_reference is None:
            answers = [respond(fusion, sample, settings) for sample in _progress("Evaluating", samples)]
            return Evaluation(model, None, settings, tuple(_cases(samples, answers, [None] * len(samples))))
    with LogProbabilities(len(words)) as kept:
        with open_reference() as fusion:
            reference = _info(fusion)
            check_comparable(fusion, words, model.source)
            expected = [
                generate(fusion, _prepared(fusion, sample, settings), kept)
                for sample in _progress("Asking the reference", samples)
            ]
        answers, comparisons = [], []
        with open_model() as fusion:
            for sample, answer in zip(_progress("Evaluating", samples), expected, strict=True):
                answers.append(respond(fusion, sample, settings))
                comparisons.append(_compare(fusion, sample, settings, answers[-1], answer, kept))
    return Evaluation(model, reference, settings, tuple(_cases(samples, answers, comparisons)))


def _info(fusion: Fusion) -> ModelInfo:
    manifest = fusion.manifest
    return ModelInfo(manifest.source, manifest.target, manifest.precision, manifest.size, fusion.device.name)


def _progress(label: str, items: Sequence[T]) -> Iterator[T]:
    with Progress(label, len(items), unit=None) as progress:
        for item in items:
            yield item
            progress.advance(1)


def _prepared(fusion: Fusion, sample: Sample, settings: Settings) -> PreparedQuestion:
    return fusion.pipeline.prepare(
        sample.load(),
        sample.question,
        sampling=Sampling(max_new_tokens=settings.max_new_tokens),
        query_length=settings.query_length,
    )


def _compare(
    fusion: Fusion,
    sample: Sample,
    settings: Settings,
    given: Response,
    reference: ReferenceAnswer,
    kept: LogProbabilities,
) -> CaseComparison:
    """Run the reference's tokens through the model, and compare the log-probabilities of each."""
    theirs = kept.read(reference.rows)
    ours = force(fusion, _prepared(fusion, sample, settings), reference.token_ids, len(reference.rows))
    return CaseComparison(
        answer=reference.text,
        is_same=given.token_ids == reference.token_ids,
        same_tokens=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        kl_divergences=tuple(divergences(theirs, ours).tolist()),
    )


def _cases(
    samples: Sequence[Sample], answers: Iterable[Response], comparisons: Iterable[CaseComparison | None]
) -> Iterator[CaseResult]:
    images = [None, *(sample.image for sample in samples)]
    follow_ups = (before == image for before, image in pairwise(images))
    for sample, given, comparison, is_follow_up in zip(samples, answers, comparisons, follow_ups, strict=True):
        expected = sample.answer or ""
        yield CaseResult(
            image=str(sample.image),
            question=sample.question,
            expected=expected,
            answer=given.text,
            finish_reason=given.finish_reason,
            is_right={EXACT: is_exact(given.text, expected), CONTAINS: contains(given.text, expected)},
            confidence=given.confidence,
            is_follow_up=is_follow_up,
            seconds=given.seconds,
            comparison=comparison,
        )
