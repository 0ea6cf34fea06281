"""What tables, reports and comparisons share: the names of cases and measures, and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_edge.benchmarks.latency.result import BundleFacts, Case, Measured, Result, Summary

STEP = "step"
PREFILL = "prefill"
OTHER = "other"
"""What a first token takes beyond the stages that were timed on their own."""
FIRST_TOKEN, FURTHER_QUESTION, ANSWER = "first token", "further question", "answer"

_OF_THE_QUESTION = ("preprocess", "vision of the question", PREFILL, "sampling")
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
    """``option`` is a field of :class:`Case`."""
    value = getattr(case, option)
    return value if isinstance(value, str) else f"{value:,}"


def case_name(case: Case, options: Sequence[str] = tuple(_OPTIONS)) -> str:
    """``cpu, threads 2, context 1,024``: by the options given."""
    return ", ".join(_OPTIONS[option].format(option_value(case, option)) for option in options)


def differing_options(cases: Sequence[Case]) -> list[str]:
    """Those by which the cases are told apart."""
    return [option for option in _OPTIONS if len({getattr(case, option) for case in cases}) > 1]


def common_options(cases: Sequence[Case]) -> list[str]:
    """Those that all cases share."""
    differing = differing_options(cases)
    return [option for option in _OPTIONS if option not in differing]


def measures(measured: Measured) -> dict[str, Summary]:
    """All that was timed repeatedly: the stages, then what they add up to."""
    return {
        **measured.stages,
        FIRST_TOKEN: measured.first_token,
        FURTHER_QUESTION: measured.further_first_token,
        ANSWER: measured.answer_seconds,
    }


def first_question(measured: Measured) -> list[tuple[str, float]]:
    """Stages of the first question about an image to its first token, with their median seconds."""
    return _stages(measured, [name for name in measured.stages if name != STEP], measured.first_token)


def further_question(measured: Measured) -> list[tuple[str, float]]:
    """Stages of a further question about the same image to its first token, with their median seconds."""
    return _stages(
        measured, [name for name in measured.stages if name in _OF_THE_QUESTION], measured.further_first_token
    )


def _stages(measured: Measured, names: Sequence[str], total: Summary) -> list[tuple[str, float]]:
    stages = [(name, measured.stages[name].median) for name in names]
    rest = total.median - sum(seconds for _, seconds in stages)
    return [*stages, (OTHER, rest)] if rest > 0 else stages


def remarks(result: Result) -> list[str]:
    """Why devices were slower than they may be, with their names."""
    told = [f"{one.case.device}: {one.remark}" for one in result.measured if one.remark is not None]
    return list(dict.fromkeys(told))


def bundle_name(bundle: BundleFacts) -> str:
    """``FUSION-3B, cpu, int4``."""
    return f"{bundle.source}, {bundle.target}, {bundle.precision}"


def duration(seconds: float) -> str:
    """Three digits: ``61.2 ms``."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * factor:
            return f"{three_digits(seconds / factor)} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def rate(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: ``33.1 GB/s`` for the unit ``B/s``."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            return f"{three_digits(value / factor)} {prefix}{unit}"
    return f"{three_digits(value)} {unit}"


def three_digits(value: float) -> str:
    """``1,234``, ``123``, ``12.3``, ``1.23``, ``0.123``."""
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{decimals}f}"


def error(summary: Summary) -> str:
    """Of the median: ``±1.2%``; ``±?`` of too few repeats to know."""
    return "±?" if summary.error is None else f"±{summary.error:.1%}"
