"""Whether one result is faster than another: ratios of medians, told apart from noise.

The noise is that of the repeats in both files. What differs from one start of a process to the next, such as where its
memory lies, is in no single file: a small difference is only sure if it shows again when both are measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fusion_edge.benchmarks.latency.report import labels
from fusion_edge.benchmarks.latency.result import Case, Measured, Result, Summary
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes, format_table

FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no difference shown", "too few repeats"
BUSY = 0.5  # of the cores, by the load average: other programs then take turns with what is measured


@dataclass(frozen=True)
class Comparison:
    """One measure of one case in both results."""

    case: Case
    measure: str
    """A stage, ``first token``, ``further question`` or ``answer``."""
    before: float
    """Median seconds."""
    after: float
    ratio: float
    """After over before: above 1 is slower."""
    interval: tuple[float, float] | None
    """95 % confidence interval of the ratio; None if a result has too few repeats for one."""

    @property
    def name(self) -> str:
        """The measure and its case."""
        return f"{self.measure} ({labels.case_name(self.case)})"

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` only if the interval excludes 1."""
        if self.interval is None:
            return UNKNOWN
        low, high = self.interval
        return SLOWER if low > 1 else FASTER if high < 1 else SAME


def compare(before: Result, after: Result) -> list[Comparison]:
    """Every measure that equal cases have in both results.

    Raises :class:`FusionError` if there is none, for a result that has a case twice, and for a time not above 0.
    """
    old, new = _by_case(before), _by_case(after)
    if not old.keys() & new.keys():
        cases = [labels.case_name(next(iter(one))) if one else "no case" for one in (old, new)]
        raise FusionError("The results have no case in common; expected equal options, got {} and {}.".format(*cases))
    comparisons = []
    for case in (case for case in old if case in new):
        measures = labels.measures(new[case])
        for name, summary in labels.measures(old[case]).items():
            if name in measures:
                comparisons.append(_comparison(case, name, summary, measures[name]))
    return comparisons


def _by_case(result: Result) -> dict[Case, Measured]:
    cases: dict[Case, Measured] = {}
    for measured in result.measured:
        if measured.case in cases:
            name = labels.case_name(measured.case)
            raise FusionError(f"A result has the same case twice: {name}; expected every case once, measure it again.")
        cases[measured.case] = measured
    return cases


def _comparison(case: Case, name: str, before: Summary, after: Summary) -> Comparison:
    if min(before.least, after.least) <= 0:
        where = f"{name!r} of {labels.case_name(case)}"
        raise FusionError(f"{where} has a time of 0; expected times above 0, measure it again.")
    return Comparison(
        case=case,
        measure=name,
        before=before.median,
        after=after.median,
        ratio=after.median / before.median,
        interval=_interval(before, after),
    )


def _interval(before: Summary, after: Summary) -> tuple[float, float] | None:
    """From the intervals of two independent medians to that of their ratio.

    Zou and Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27 (2008): the
    distances from estimate to limit, here of logarithms, add up in squares.
    """
    if before.interval is None or after.interval is None:
        return None
    old, new = math.log(before.median), math.log(after.median)
    (old_low, old_high), (new_low, new_high) = map(math.log, before.interval), map(math.log, after.interval)
    down = math.hypot(new - new_low, old_high - old)
    up = math.hypot(new_high - new, old - old_low)
    return math.exp(new - old - down), math.exp(new - old + up)


def fail_above(comparisons: Sequence[Comparison], share: float) -> list[Comparison]:
    """Those that are slower by more than ``share`` (0.05 is 5 %) with 95 % confidence: the whole interval is above."""
    return [one for one in comparisons if one.interval is not None and one.interval[0] > 1 + share]


def differences(before: Result, after: Result) -> list[str]:
    """Why the results may not be comparable: a line for each thing that differs, and for cases that only one has."""
    pairs = [
        ("bundle", labels.bundle_name(before.bundle), labels.bundle_name(after.bundle)),
        ("digest of the bundle", before.bundle.digest[:12], after.bundle.digest[:12]),
        ("processor", before.machine.processor, after.machine.processor),
        ("cores", before.machine.cores, after.machine.cores),
        ("memory", format_bytes(before.machine.memory), format_bytes(after.machine.memory)),
        ("governor", before.machine.governor, after.machine.governor),
        ("GPU", before.machine.gpu, after.machine.gpu),
        ("power mode", before.machine.power_mode, after.machine.power_mode),
        ("throttled", before.machine.throttled, after.machine.throttled),
        ("system", before.machine.system, after.machine.system),
        ("remark", " ".join(labels.remarks(before)), " ".join(labels.remarks(after))),
    ]
    old, new = before.machine.versions, after.machine.versions
    pairs += [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]
    lines = [f"{name} differs: {a or 'none'} before, {b or 'none'} after" for name, a, b in pairs if a != b]
    for which, result, other in (("before", before, after), ("after", after, before)):
        cases = {measured.case for measured in other.measured}
        lines += [
            f"only {which}: {labels.case_name(measured.case)}"
            for measured in result.measured
            if measured.case not in cases
        ]
        machine = result.machine
        if machine.load_average > BUSY * machine.cores:
            load = f"a load of {machine.load_average:.2f} on {machine.cores} cores"
            lines.append(f"other programs may have run {which}: {load} at the start")
        if any(measured.is_noisy for measured in result.measured):
            lines.append(f"the machine was too noisy {which}: intervals are wide")
        timed = [one for measured in result.measured for one in labels.measures(measured).values()]
        if few := sum(one.interval is None for one in timed):
            lines.append(f"{few} medians have too few repeats {which} to be judged: measure for more --seconds")
    return lines


def text(comparisons: Sequence[Comparison]) -> str:
    """A table for each case."""
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
    interval = "{:.3f} to {:.3f}".format(*comparison.interval) if comparison.interval else "-"
    times = [labels.duration(comparison.before), labels.duration(comparison.after)]
    return [comparison.measure, *times, f"{comparison.ratio:.3f}", interval, comparison.verdict]


def to_json(comparisons: Sequence[Comparison], warnings: Sequence[str]) -> str:
    """The fields of :class:`Comparison`, its verdict, and the lines of :func:`differences`."""
    rows = [{**asdict(comparison), "verdict": comparison.verdict} for comparison in comparisons]
    return json.dumps({"warnings": list(warnings), "comparisons": rows}, indent=1) + "\n"
