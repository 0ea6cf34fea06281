"""Summarize the cases of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_edge.benchmarks.evaluation.calibration_error import expected_calibration_error, reliability
from fusion_edge.benchmarks.evaluation.result import (
    Calibration,
    CaseResult,
    Comparison,
    ModelInfo,
    Percentiles,
)
from fusion_edge.benchmarks.evaluation.scores import Share
from fusion_edge.benchmarks.latency.statistics import percentile


def accuracy(cases: Sequence[CaseResult]) -> dict[str, Share]:
    """Return the share of right answers by way to judge."""
    return {way: Share.of(sum(case.is_right[way] for case in cases), len(cases)) for way in cases[0].is_right}


def calibration(cases: Sequence[CaseResult], judged_by: str) -> Calibration:
    """Compare confidence with accuracy, over the cases that have a confidence."""
    pairs = [(case.confidence, case.is_right[judged_by]) for case in cases if case.confidence is not None]
    confidences, is_right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return Calibration(expected_calibration_error(confidences, is_right), reliability(confidences, is_right))


def latency(cases: Sequence[CaseResult]) -> dict[str, Percentiles]:
    """Return percentiles by stage, without stages that took no time in any case."""
    stages = dict.fromkeys(stage for case in cases for stage in case.seconds)
    values = {stage: sorted(case.seconds[stage] for case in cases if stage in case.seconds) for stage in stages}
    return {stage: percentiles(ordered) for stage, ordered in values.items() if ordered[-1] > 0}


def percentiles(ordered: Sequence[float]) -> Percentiles:
    """Return percentiles of ascending values."""
    return Percentiles(len(ordered), *(percentile(ordered, share) for share in (0.5, 0.95, 0.99)))


def comparison(cases: Sequence[CaseResult], reference: ModelInfo | None) -> Comparison | None:
    """Return the agreement of all cases with the reference; None without one."""
    compared = [case.comparison for case in cases if case.comparison is not None]
    if reference is None or not compared:
        return None
    positions = [value for one in compared for value in one.kl_divergences]
    return Comparison(
        reference=reference,
        same_answer=Share.of(sum(one.is_same for one in compared), len(compared)),
        same_token=Share.of(sum(one.same_tokens for one in compared), len(positions)),
        kl_first_token=sum(one.kl_divergences[0] for one in compared) / len(compared),
        kl_per_position=sum(positions) / len(positions),
    )


def worst(cases: Sequence[CaseResult], judged_by: str, count: int) -> list[tuple[int, CaseResult]]:
    """Return numbers and cases: wrong answers, the most confident first; then right ones far from the reference."""

    def rank(case: CaseResult) -> tuple[bool, float]:
        if not case.is_right[judged_by]:
            return False, -(case.confidence or 0.0)
        return True, -_divergence(case)

    ranked = sorted(enumerate(cases), key=lambda pair: rank(pair[1]))
    shown = [pair for pair in ranked if not pair[1].is_right[judged_by] or _divergence(pair[1]) > 0]
    return shown[:count]


def _divergence(case: CaseResult) -> float:
    return 0.0 if case.comparison is None else max(case.comparison.kl_divergences)
