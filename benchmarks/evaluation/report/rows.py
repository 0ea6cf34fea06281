"""A result's facts as names and texts, for the table and the page."""

from __future__ import annotations

from collections.abc import Mapping

from fusion_edge.benchmarks.evaluation.result import EvalResult, ModelInfo, Percentiles
from fusion_edge.benchmarks.evaluation.scores import Share
from fusion_edge.benchmarks.latency.report.labels import duration

FIRST, FOLLOW_UP = "Question about a new image", "Follow-up question about the same image"


def model_name(model: ModelInfo) -> str:
    """Return a name such as ``FUSION-3B, cpu, int4``."""
    return f"{model.source}, {model.target}, {model.precision}"


def asked(result: EvalResult) -> str:
    """Return what was asked, and how."""
    settings = result.settings
    parts = [f"{len(result.cases):,} samples of {result.data} on {result.model.device}"]
    parts += [f"{settings.image_tokens} image tokens", f"{settings.query_length} latents"]
    if settings.guide is not None:
        parts.append(f"guide {settings.guide!r}")
    if settings.choices:
        parts.append(f"choices {', '.join(settings.choices)}")
    return ", ".join(parts)


def shares(result: EvalResult) -> dict[str, Share]:
    """Return the accuracy by way to judge, and the agreement with the reference."""
    found = {f"accuracy, {way}": share for way, share in result.accuracy.items()}
    if result.comparison is not None:
        found["same answer as the reference"] = result.comparison.same_answer
        found["same token as the reference"] = result.comparison.same_token
    return found


def percent(share: float) -> str:
    """Format a share as ``99.7%``."""
    return f"{100 * share:.1f}%"


def interval(share: Share) -> str:
    """Format a confidence interval as ``99.1% to 99.9%``."""
    return " to ".join(map(percent, share.ci95))


def figures(result: EvalResult) -> dict[str, str]:
    """Return the other figures: calibration error, late answers, divergence from the reference."""
    found = {f"calibration error ({result.judged_by})": percent(result.calibration.error)}
    if result.settings.deadline is not None:
        found[f"later than the deadline of {result.settings.deadline:g} s"] = f"{result.late:,}"
    if (comparison := result.comparison) is not None:
        found["KL divergence, first token"] = f"{comparison.kl_first_token:.2g} nats"
        found["KL divergence, per position"] = f"{comparison.kl_per_position:.2g} nats"
    return found


def latencies(result: EvalResult) -> dict[str, Mapping[str, Percentiles]]:
    """Return the percentiles of every stage by kind of question, without kinds that were not asked."""
    return {name: stages for name, stages in ((FIRST, result.first), (FOLLOW_UP, result.follow_up)) if stages}


def times(percentiles: Percentiles) -> list[str]:
    """Format p50, p95, p99 and the count."""
    return [*map(duration, (percentiles.p50, percentiles.p95, percentiles.p99)), f"{percentiles.count:,}"]
