"""Names of cases and measures, and formatted numbers, for tables, reports and comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_edge.benchmarks.latency.result import BenchResult, BundleInfo, Case, CaseResult
from fusion_edge.benchmarks.latency.statistics import Summary
from fusion_edge.runtime.stages import DECODE_STEP, ENCODE_LOCAL, PREFILL, PREPROCESS, SAMPLING

OTHER = "other"
"""Time to first token outside the timed stages."""
TTFT, FOLLOWUP_TTFT, ANSWER = "TTFT", "follow-up TTFT", "answer"

_FOLLOWUP_STAGES = (PREPROCESS, ENCODE_LOCAL, PREFILL, SAMPLING)
_OPTIONS = {
    "device": "{}",
    "threads": "threads {}",
    "query_length": "query length {}",
    "image_tokens": "image tokens {}",
    "prompt_tokens": "prompt {}",
    "new_tokens": "new tokens {}",
    "context": "context {}",
}


def option_value(case: Case, option: str) -> str:
    """Return the value of a field of :class:`Case`."""
    value = getattr(case, option)
    return value if isinstance(value, str) else f"{value:,}"


def case_name(case: Case, options: Sequence[str] = tuple(_OPTIONS)) -> str:
    """Return a name such as ``cpu, threads 2, context 1,024`` from the given options."""
    return ", ".join(_OPTIONS[option].format(option_value(case, option)) for option in options)


def differing_options(cases: Sequence[Case]) -> list[str]:
    """Return the options that distinguish the cases."""
    return [option for option in _OPTIONS if len({getattr(case, option) for case in cases}) > 1]


def common_options(cases: Sequence[Case]) -> list[str]:
    """Return the options that all cases share."""
    differing = differing_options(cases)
    return [option for option in _OPTIONS if option not in differing]


def measures(result: CaseResult) -> dict[str, Summary]:
    """Return every timed stage, then the totals."""
    return {**result.stages, TTFT: result.ttft, FOLLOWUP_TTFT: result.followup_ttft, ANSWER: result.answer}


def first_question(result: CaseResult) -> list[tuple[str, float]]:
    """Return the stages of a first question up to its first token, with median seconds."""
    return _stages(result, [name for name in result.stages if name != DECODE_STEP], result.ttft)


def followup_question(result: CaseResult) -> list[tuple[str, float]]:
    """Return the stages of a follow-up question up to its first token, with median seconds."""
    return _stages(result, [name for name in result.stages if name in _FOLLOWUP_STAGES], result.followup_ttft)


def _stages(result: CaseResult, names: Sequence[str], total: Summary) -> list[tuple[str, float]]:
    stages = [(name, result.stages[name].p50) for name in names]
    rest = total.p50 - sum(seconds for _, seconds in stages)
    return [*stages, (OTHER, rest)] if rest > 0 else stages


def remarks(result: BenchResult) -> list[str]:
    """Return each distinct remark with its device."""
    found = [f"{one.case.device}: {one.remark}" for one in result.cases if one.remark is not None]
    return list(dict.fromkeys(found))


def bundle_name(bundle: BundleInfo) -> str:
    """Return a name such as ``FUSION-3B, cpu, int4``."""
    return f"{bundle.source}, {bundle.target}, {bundle.precision}"


def duration(seconds: float) -> str:
    """Format seconds with three digits: ``61.2 ms``."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * factor:
            return f"{three_digits(seconds / factor)} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def rate(value: float, unit: str) -> str:
    """Format a value with three digits and a decimal prefix: ``33.1 GB/s`` for the unit ``B/s``."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            return f"{three_digits(value / factor)} {prefix}{unit}"
    return f"{three_digits(value)} {unit}"


def three_digits(value: float) -> str:
    """Format a value as ``1,234``, ``123``, ``12.3``, ``1.23`` or ``0.123``."""
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{decimals}f}"


def error(summary: Summary) -> str:
    """Format the error of a median: ``±1.2%``, or ``±?`` with too few rounds."""
    return "±?" if summary.error is None else f"±{summary.error:.1%}"
