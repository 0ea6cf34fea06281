"""Compare two results: ratios of medians with confidence intervals.

The intervals cover the noise within both runs. They do not cover what changes between two process starts, such as
memory placement: measure both again before trusting a small difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fusion_edge.benchmarks.latency.report import labels
from fusion_edge.benchmarks.latency.result import BenchResult, Case, CaseResult
from fusion_edge.benchmarks.latency.statistics import Summary
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes, format_table

FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no significant difference", "too few rounds"
SCHEMA_NAME, SCHEMA_VERSION = "fusion-bench compare", 2
BUSY = 0.5  # load average per core from which other processes compete for the cores


@dataclass(frozen=True)
class Comparison:
    """One measure of one case in both results."""

    case: Case
    measure: str
    """A stage, ``TTFT``, ``follow-up TTFT`` or ``answer``."""
    before: float
    """Median seconds."""
    after: float
    """Median seconds."""
    ratio: float
    """After over before; above 1 is slower."""
    ci95: tuple[float, float] | None
    """95% confidence interval of the ratio; None if a result has too few rounds."""

    @property
    def name(self) -> str:
        """Measure and case."""
        return f"{self.measure} ({labels.case_name(self.case)})"

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` if the interval excludes 1."""
        if self.ci95 is None:
            return UNKNOWN
        low, high = self.ci95
        return SLOWER if low > 1 else FASTER if high < 1 else SAME


def compare(before: BenchResult, after: BenchResult) -> list[Comparison]:
    """Compare every measure that equal cases of both results have.

    Raises:
        FusionError: No case is in both results, a result has a case twice, or a time is 0.
    """
    old, new = _by_case(before), _by_case(after)
    if not old.keys() & new.keys():
        cases = [labels.case_name(next(iter(one))) if one else "no case" for one in (old, new)]
        raise FusionError(
            "The results have no case in common: {} and {}; measure both with the same options.".format(*cases)
        )
    comparisons = []
    for case in (case for case in old if case in new):
        measures = labels.measures(new[case])
        for name, summary in labels.measures(old[case]).items():
            if name in measures:
                comparisons.append(_comparison(case, name, summary, measures[name]))
    return comparisons


def _by_case(result: BenchResult) -> dict[Case, CaseResult]:
    cases: dict[Case, CaseResult] = {}
    for one in result.cases:
        if one.case in cases:
            raise FusionError(f"A result has the case {labels.case_name(one.case)} twice; measure it again.")
        cases[one.case] = one
    return cases


def _comparison(case: Case, name: str, before: Summary, after: Summary) -> Comparison:
    if min(before.min, after.min) <= 0:
        where = f"{name!r} of {labels.case_name(case)}"
        raise FusionError(f"{where} has a time of 0; expected times above 0, measure it again.")
    return Comparison(
        case=case,
        measure=name,
        before=before.p50,
        after=after.p50,
        ratio=after.p50 / before.p50,
        ci95=_interval(before, after),
    )


def _interval(before: Summary, after: Summary) -> tuple[float, float] | None:
    """Return the interval of a ratio from the intervals of two independent medians.

    The distances from estimate to limit, as logarithms, add up in squares (Zou and Donner, "Construction of confidence
    limits about effect measures", Statistics in Medicine 27, 2008).
    """
    if before.ci95 is None or after.ci95 is None:
        return None
    old, new = math.log(before.p50), math.log(after.p50)
    (old_low, old_high), (new_low, new_high) = map(math.log, before.ci95), map(math.log, after.ci95)
    down = math.hypot(new - new_low, old_high - old)
    up = math.hypot(new_high - new, old - old_low)
    return math.exp(new - old - down), math.exp(new - old + up)


def fail_above(comparisons: Sequence[Comparison], share: float) -> list[Comparison]:
    """Return the measures whose whole interval is above ``1 + share`` (0.05 is 5%)."""
    return [one for one in comparisons if one.ci95 is not None and one.ci95[0] > 1 + share]


def differences(before: BenchResult, after: BenchResult) -> list[str]:
    """Return one line per reason why the results may not be comparable."""
    pairs = [
        ("bundle", labels.bundle_name(before.bundle), labels.bundle_name(after.bundle)),
        ("bundle digest", before.bundle.digest[:12], after.bundle.digest[:12]),
        ("processor", before.machine.processor, after.machine.processor),
        ("cores", before.machine.cores, after.machine.cores),
        ("memory", format_bytes(before.machine.memory), format_bytes(after.machine.memory)),
        ("governor", before.machine.governor, after.machine.governor),
        ("GPU", before.machine.gpu, after.machine.gpu),
        ("power mode", before.machine.power_mode, after.machine.power_mode),
        ("throttling", before.machine.throttled, after.machine.throttled),
        ("system", before.machine.system, after.machine.system),
        ("remark", " ".join(labels.remarks(before)), " ".join(labels.remarks(after))),
    ]
    old, new = before.machine.versions, after.machine.versions
    pairs += [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]
    lines = [f"{name} differs: {a or 'none'} before, {b or 'none'} after" for name, a, b in pairs if a != b]
    for which, result, other in (("before", before, after), ("after", after, before)):
        cases = {one.case for one in other.cases}
        lines += [f"only {which}: {labels.case_name(one.case)}" for one in result.cases if one.case not in cases]
        machine = result.machine
        if machine.load_average > BUSY * machine.cores:
            load = f"load average {machine.load_average:.2f} on {machine.cores} cores"
            lines.append(f"other processes may have run {which}: {load} at the start")
        if any(one.is_noisy for one in result.cases):
            lines.append(f"the machine was too noisy {which}: intervals are wide")
        summaries = [summary for one in result.cases for summary in labels.measures(one).values()]
        if few := sum(summary.ci95 is None for summary in summaries):
            lines.append(f"{few} medians have too few rounds {which} for a verdict: raise --seconds")
    return lines


def text(comparisons: Sequence[Comparison]) -> str:
    """Return one table per case."""
    cases = list(dict.fromkeys(comparison.case for comparison in comparisons))
    options = labels.differing_options(cases)
    header = labels.case_name(cases[0], labels.common_options(cases)) + "\n"
    blocks = [header] if header.strip() else []
    for case in cases:
        rows = [["", "before", "after", "ratio", "95% interval", "verdict"]]
        rows += [_row(comparison) for comparison in comparisons if comparison.case == case]
        title = f"{labels.case_name(case, options)}\n" if options else ""
        blocks.append(title + format_table(rows))
    return "\n".join(blocks)


def _row(comparison: Comparison) -> list[str]:
    interval = "{:.3f} to {:.3f}".format(*comparison.ci95) if comparison.ci95 else "-"
    times = [labels.duration(comparison.before), labels.duration(comparison.after)]
    return [comparison.measure, *times, f"{comparison.ratio:.3f}", interval, comparison.verdict]


def to_json(comparisons: Sequence[Comparison], warnings: Sequence[str]) -> str:
    """Return the fields of every :class:`Comparison` with its verdict, and the lines of :func:`differences`."""
    rows = [{**asdict(comparison), "verdict": comparison.verdict} for comparison in comparisons]
    header = {"schema": SCHEMA_NAME, "schema_version": SCHEMA_VERSION}
    return json.dumps({**header, "warnings": list(warnings), "comparisons": rows}, indent=1) + "\n"
