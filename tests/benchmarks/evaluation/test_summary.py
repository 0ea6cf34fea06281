"""Summaries of cases: shares, calibration, percentiles, agreement, and the order of the worst cases."""

from __future__ import annotations

import math

from fusion_edge.benchmarks.evaluation.result import CaseComparison, CaseResult, ModelInfo
from fusion_edge.benchmarks.evaluation.summary import accuracy, calibration, comparison, latency, worst

REFERENCE = ModelInfo("FUSION", "cpu", "fp32", 0, "eager")


def case(
    right: bool, confidence: float | None = None, divergences: tuple[float, ...] = (), **seconds: float
) -> CaseResult:
    compared = CaseComparison("a", right, int(right), divergences) if divergences else None
    return CaseResult("i", "q", "a", "a", "stop", {"exact": right}, confidence, False, seconds, compared)


def test_accuracy() -> None:
    share = accuracy([case(True), case(False), case(True), case(True)])["exact"]
    assert (share.count, share.total, share.share) == (3, 4, 0.75)


def test_calibration_leaves_out_answers_without_confidence() -> None:
    cases = [case(True, 0.95), case(False, 0.95), case(False, 0.15), case(False)]
    result = calibration(cases, "exact")
    assert [(bin.count, bin.accuracy) for bin in result.bins] == [(1, 0.0), (2, 0.5)]
    assert math.isclose(result.error, (1 * 0.15 + 2 * 0.45) / 3)


def test_latency_leaves_out_stages_that_never_run() -> None:
    cases = [case(True, prefill=float(i), decode=0.0) for i in range(100)]
    cases.append(case(True, prefill=100.0, look=2.0))
    stages = latency(cases)
    assert stages.keys() == {"prefill", "look"}
    prefill = stages["prefill"]
    assert (prefill.count, prefill.p50, prefill.p95, prefill.p99) == (101, 50, 95, 99)
    assert stages["look"].count == 1
    assert latency([]) == {}


def test_comparison_weighs_positions_equally() -> None:
    cases = [case(True, None, (0.1,)), case(False, None, (0.3, 0.2, 0.0)), case(True)]
    result = comparison(cases, REFERENCE)
    assert result is not None
    assert (result.same_answer.count, result.same_answer.total) == (1, 2)
    assert (result.same_token.count, result.same_token.total) == (1, 4)
    assert math.isclose(result.kl_first_token, 0.2)
    assert math.isclose(result.kl_per_position, 0.15)
    assert comparison(cases, None) is comparison([case(True)], REFERENCE) is None


def test_worst_are_confident_mistakes_then_far_from_the_reference() -> None:
    cases = [
        case(True, 0.5, (0.1, 0.4)),
        case(False, 0.6),
        case(True, 0.9),
        case(False, None),
        case(True, 0.5, (0.7,)),
        case(False, 0.9, (0.1,)),
        case(True, 0.5, (0.0,)),
    ]
    assert [number for number, _ in worst(cases, "exact", 9)] == [5, 1, 3, 4, 0]
    assert worst(cases, "exact", 2) == [(5, cases[5]), (1, cases[1])]
