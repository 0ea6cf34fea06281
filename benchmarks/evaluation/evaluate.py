"""Ask a model the questions of samples, and judge its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from fusion_edge.benchmarks.evaluation.asking import Questioner, model_info
from fusion_edge.benchmarks.evaluation.progress import shown
from fusion_edge.benchmarks.evaluation.reference import Reference, check_comparable, vocabulary
from fusion_edge.benchmarks.evaluation.result import (
    CHOICE,
    CONTAINS,
    EXACT,
    CaseResult,
    ModelInfo,
    Settings,
)
from fusion_edge.benchmarks.evaluation.samples import check_answers
from fusion_edge.benchmarks.evaluation.scores import contains, is_exact
from fusion_edge.runtime import Fusion
from fusion_edge.runtime.samples import Sample

OpenModel = Callable[[], AbstractContextManager[Fusion]]
"""Opens a model; leaving the context closes it."""


@dataclass(frozen=True)
class Evaluation:
    """A model's answers, and what they were compared with."""

    model: ModelInfo
    reference: ModelInfo | None
    settings: Settings
    cases: tuple[CaseResult, ...]


def evaluate(
    open_model: OpenModel,
    samples: Sequence[Sample],
    settings_of: Callable[[Fusion], Settings],
    open_reference: OpenModel | None = None,
) -> Evaluation:
    """Ask a model every question; first a reference, if there is one, which takes each question as its own guide.

    Only one model is open at a time. ``settings_of`` returns the settings for the opened model. Raises
    :class:`UsageError` for a reference of another model and for samples that do not fit the choices,
    :class:`FusionError` for a question that is too long.
    """
    with open_model() as fusion:
        settings = settings_of(fusion)
        check_answers(samples, settings.choices)
        if open_reference is None:
            return ask(fusion, samples, settings)
        source, words = fusion.manifest.source, vocabulary(fusion)
    with open_reference() as fusion:
        check_comparable(fusion, words, source)
        reference = Reference(fusion, samples, replace(settings, guide=None, deadline=None))
    with reference, open_model() as fusion:
        return ask(fusion, samples, settings, reference)


def ask(
    fusion: Fusion, samples: Sequence[Sample], settings: Settings, reference: Reference | None = None
) -> Evaluation:
    """Ask an opened model every question, and compare its answers with those of a reference."""
    questioner = Questioner(fusion, settings)
    judges = {CHOICE: is_exact} if settings.choices else {EXACT: is_exact, CONTAINS: contains}
    cases: list[CaseResult] = []
    for number, sample in enumerate(shown("Evaluating", samples)):
        given = questioner.respond(sample)
        expected = sample.answer or ""
        case = CaseResult(
            image=str(sample.image),
            question=sample.question,
            expected=expected,
            answer=given.text,
            finish_reason=given.finish_reason,
            is_right={way: judge(given.text, expected) for way, judge in judges.items()},
            confidence=given.confidence,
            is_follow_up=number > 0 and samples[number - 1].image == sample.image,
            seconds=given.seconds,
            comparison=None if reference is None else reference.compare(number, sample, given, questioner),
        )
        cases.append(case)
    return Evaluation(model_info(fusion), None if reference is None else reference.model, settings, tuple(cases))
