"""Ask a model the questions of samples, and compare its answers with the expected ones and with a reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from fusion_edge.benchmarks.evaluation.asking import Questioner, Response
from fusion_edge.benchmarks.evaluation.reference import (
    LogProbabilityFile,
    ReferenceAnswer,
    check_comparable,
    divergences,
    vocabulary,
)
from fusion_edge.benchmarks.evaluation.result import (
    CHOICE,
    CONTAINS,
    EXACT,
    CaseComparison,
    CaseResult,
    ModelInfo,
    Settings,
)
from fusion_edge.benchmarks.evaluation.scores import contains, is_exact
from fusion_edge.runtime import Fusion
from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.errors import FusionError, UsageError
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
        check_answers(samples, settings.choices)
        if open_reference is None:
            questioner = Questioner(fusion, settings)
            answers = [questioner.respond(sample) for sample in _progress("Evaluating", samples)]
            return Evaluation(model, None, settings, tuple(_cases(samples, answers, [None] * len(samples), settings)))
    with LogProbabilityFile(len(words)) as kept:
        with open_reference() as fusion:
            reference = _info(fusion)
            check_comparable(fusion, words, model.source)
            expected = _ask_reference(fusion, samples, replace(settings, deadline=None), kept)
        answers, comparisons = [], []
        with open_model() as fusion:
            questioner = Questioner(fusion, settings)
            for sample, theirs in zip(_progress("Evaluating", samples), expected, strict=True):
                answers.append(questioner.respond(sample))
                comparisons.append(_compare(questioner, sample, answers[-1], theirs, kept))
    return Evaluation(model, reference, settings, tuple(_cases(samples, answers, comparisons, settings)))


def check_answers(samples: Sequence[Sample], choices: Sequence[str]) -> None:
    """Raise :class:`UsageError` for a sample whose answer is none of the ``choices``, if there are choices."""
    expected = {choice.strip() for choice in choices}
    for number, sample in enumerate(samples, 1):
        if choices and (sample.answer or "").strip() not in expected:
            raise UsageError(
                f"Sample {number} has the answer {short_repr(sample.answer)}, which is none of the choices; add it to "
                "--choices, or leave out the sample."
            )


def _info(fusion: Fusion) -> ModelInfo:
    manifest = fusion.manifest
    return ModelInfo(manifest.source, manifest.target, manifest.precision, manifest.size, fusion.device.name)


def _progress(label: str, items: Sequence[T]) -> Iterator[T]:
    with Progress(label, len(items), unit=None) as progress:
        for item in items:
            yield item
            progress.advance(1)


def _ask_reference(
    fusion: Fusion, samples: Sequence[Sample], settings: Settings, kept: LogProbabilityFile
) -> Sequence[ReferenceAnswer | Response]:
    """Return the reference's answers or choices."""
    questioner, asked = Questioner(fusion, settings), _progress("Asking the reference", samples)
    if settings.choices:
        return [questioner.respond(sample) for sample in asked]
    return [questioner.generate(sample, kept) for sample in asked]


def _compare(
    questioner: Questioner,
    sample: Sample,
    given: Response,
    reference: ReferenceAnswer | Response,
    kept: LogProbabilityFile,
) -> CaseComparison | None:
    """Compare the choices' probabilities, or the log-probabilities of each of the reference's tokens."""
    if isinstance(reference, Response):
        if not given.probabilities:
            return None
        with np.errstate(divide="ignore"):  # a probability of 0
            ours, theirs = (np.log([list(one.probabilities.values())]) for one in (given, reference))
        is_same = given.text == reference.text
        return CaseComparison(reference.text, is_same, int(is_same), tuple(divergences(theirs, ours).tolist()))
    kept_rows = kept.read(reference.rows)
    rows = questioner.force(sample, reference.token_ids, len(reference.rows))
    return CaseComparison(
        answer=reference.text,
        is_same=given.token_ids == reference.token_ids,
        same_tokens=int((rows.argmax(-1) == kept_rows.argmax(-1)).sum()),
        kl_divergences=tuple(divergences(kept_rows, rows).tolist()),
    )


def _cases(
    samples: Sequence[Sample],
    answers: Iterable[Response],
    comparisons: Iterable[CaseComparison | None],
    settings: Settings,
) -> Iterator[CaseResult]:
    images = [None, *(sample.image for sample in samples)]
    follow_ups = (before == image for before, image in pairwise(images))
    judges = {CHOICE: is_exact} if settings.choices else {EXACT: is_exact, CONTAINS: contains}
    for sample, given, comparison, is_follow_up in zip(samples, answers, comparisons, follow_ups, strict=True):
        expected = sample.answer or ""
        yield CaseResult(
            image=str(sample.image),
            question=sample.question,
            expected=expected,
            answer=given.text,
            finish_reason=given.finish_reason,
            is_right={way: judge(given.text, expected) for way, judge in judges.items()},
            confidence=given.confidence,
            is_follow_up=is_follow_up,
            seconds=given.seconds,
            comparison=comparison,
        )
