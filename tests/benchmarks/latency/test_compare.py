"""Comparisons of results: real differences are reported, noise is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import latency_samples as samples

from fusion_edge.benchmarks.latency.compare import (
    FASTER,
    SAME,
    SLOWER,
    UNKNOWN,
    Comparison,
    compare,
    differences,
    fail_above,
    text,
    to_json,
)
from fusion_edge.benchmarks.latency.report import labels
from fusion_edge.benchmarks.latency.result import BenchResult
from fusion_edge.benchmarks.latency.statistics import summarize
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.stages import DECODE_STEP

CASE = samples.case()


def of_one_case(seed: int = 0, speed: float = 1.0, noise: float = 0.01) -> BenchResult:
    return samples.result([samples.case_result(CASE, speed, noise, seed)])


def with_first_tokens(*values: float) -> BenchResult:
    (one,) = samples.result().cases
    return samples.result([replace(one, ttft=summarize(values))])


def first_token(before: BenchResult, after: BenchResult) -> Comparison:
    (comparison,) = [one for one in compare(before, after) if one.measure == labels.TTFT]
    return comparison


def test_equal_results_show_no_difference() -> None:
    result = samples.matrix()
    comparisons = compare(result, result)
    assert len(comparisons) == 12 * 11
    assert {comparison.verdict for comparison in comparisons} == {SAME}
    assert {comparison.ratio for comparison in comparisons} == {1.0}
    assert not fail_above(comparisons, 0)
    assert differences(result, result) == [
        f"the machine was too noisy {which}: intervals are wide" for which in ("before", "after")
    ]


def test_slower_by_a_fifth() -> None:
    comparisons = compare(of_one_case(), of_one_case(seed=1, speed=1 / 1.2))
    assert [one.measure for one in comparisons] == list(labels.measures(of_one_case().cases[0]))
    for one in comparisons:
        assert one.verdict == SLOWER
        assert one.ci95 is not None
        low, high = one.ci95
        assert 1.17 < low < 1.2 < high < 1.23
        assert low < one.ratio < high
    assert fail_above(comparisons, 0.05) == comparisons
    assert fail_above(comparisons, 0.25) == []
    back = compare(of_one_case(seed=1, speed=1 / 1.2), of_one_case())
    assert {one.verdict for one in back} == {FASTER}
    assert fail_above(back, 0) == []


def test_noise_gives_no_verdict() -> None:
    """A slowdown of 5% in a noise of 30% gives no verdict, whatever the ratio of the medians is."""
    comparisons = compare(of_one_case(seed=5, noise=0.3), of_one_case(seed=6, speed=1 / 1.05, noise=0.3))
    of_25 = [one for one in comparisons if one.measure != DECODE_STEP]
    assert {one.verdict for one in of_25} == {SAME}
    assert max(abs(math.log(one.ratio)) for one in of_25) > 0.03
    assert fail_above(of_25, 0.05) == []


def test_interval_of_the_ratio_has_its_nominal_coverage() -> None:
    """Coverage is 95% or slightly more for long-tailed times of unequal number and spread."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        before = generator.lognormal(0.0, 0.05, 30)
        after = generator.lognormal(math.log(1.1), 0.2, 101)
        comparison = first_token(with_first_tokens(*before.tolist()), with_first_tokens(*after.tolist()))
        assert comparison.ci95 is not None
        held += comparison.ci95[0] <= 1.1 <= comparison.ci95[1]
    assert 0.94 <= held / 600 <= 0.99


def test_interval_worked_out_by_hand() -> None:
    """The interval of seven values is their range."""
    before, after = with_first_tokens(8, 9, 10, 10, 10, 11, 12), with_first_tokens(19, 20, 20, 20, 20, 21, 22)
    comparison = first_token(before, after)
    assert (comparison.before, comparison.after, comparison.ratio) == (10, 20, 2)
    down = math.hypot(math.log(20 / 19), math.log(12 / 10))
    up = math.hypot(math.log(22 / 20), math.log(10 / 8))
    assert comparison.ci95 == pytest.approx((2 * math.exp(-down), 2 * math.exp(up)))


times = st.lists(st.floats(1e-6, 1e3), min_size=7, max_size=40)


@given(times, times)
@settings(deadline=None)
def test_swapping_inverts_ratios(before: list[float], after: list[float]) -> None:
    one = first_token(with_first_tokens(*before), with_first_tokens(*after))
    other = first_token(with_first_tokens(*after), with_first_tokens(*before))
    assert one.ci95 is not None
    assert other.ci95 is not None
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert one.ci95 == pytest.approx((1 / other.ci95[1], 1 / other.ci95[0]))
    assert one.ci95[0] <= one.ratio * (1 + 1e-12)
    assert one.ratio <= one.ci95[1] * (1 + 1e-12)


def test_few_repeats_give_no_verdict() -> None:
    comparison = first_token(with_first_tokens(*[1.0] * 6), with_first_tokens(*[2.0] * 50))
    assert (comparison.ratio, comparison.ci95, comparison.verdict) == (2, None, UNKNOWN)
    assert fail_above([comparison], 0) == []
    (line,) = differences(with_first_tokens(*[1.0] * 6), samples.result())
    assert line == "1 medians have too few rounds before for a verdict: raise --seconds"


def test_differences_are_named() -> None:
    before = samples.result()
    after = samples.result([samples.case_result(samples.case(context=7))], "Other", "Cortex-A78")
    after = replace(after, machine=replace(after.machine, gpu="NVIDIA Orin", versions={"python": "3.12.1"}))
    lines = differences(before, after)
    assert "processor differs: AMD EPYC 9R14 before, Cortex-A78 after" in lines
    names = (labels.bundle_name(result.bundle) for result in (before, after))
    assert "bundle differs: {} before, {} after".format(*names) in lines
    assert "GPU differs: none before, NVIDIA Orin after" in lines
    assert "python differs: 3.11.9 before, 3.12.1 after" in lines
    assert "numpy differs: 2.2.1 before, none after" in lines
    assert f"only before: {labels.case_name(CASE)}" in lines
    assert f"only after: {labels.case_name(samples.case(context=7))}" in lines
    remarked = samples.result([replace(samples.case_result(CASE), remark="No kernels.")])
    assert differences(before, remarked) == ["remark differs: none before, cpu: No kernels. after"]
    busy = replace(before, machine=replace(before.machine, load_average=1.2))
    assert differences(before, busy) == [
        "other processes may have run after: load average 1.20 on 2 cores at the start"
    ]
    assert differences(before, before) == []


def test_only_equal_cases_and_stages_are_paired() -> None:
    one = samples.case_result(CASE)
    fewer = replace(one, stages={name: one.stages[name] for name in ("prefill", DECODE_STEP)})
    comparisons = compare(samples.result([samples.case_result(samples.case(context=7)), one]), samples.result([fewer]))
    assert {comparison.case for comparison in comparisons} == {CASE}
    assert [comparison.measure for comparison in comparisons] == [
        "prefill",
        DECODE_STEP,
        labels.TTFT,
        labels.FOLLOWUP_TTFT,
        labels.ANSWER,
    ]


def test_table_and_json() -> None:
    comparisons = compare(of_one_case(), of_one_case(seed=1, speed=0.5))
    lines = text(comparisons).splitlines()
    assert lines[0] == labels.case_name(CASE)
    (prefill,) = [line.split() for line in lines if line.startswith("prefill")]
    assert (prefill[0], prefill[-1], round(float(prefill[5]), 1)) == ("prefill", SLOWER, 2.0)
    two = compare(samples.matrix(), samples.matrix())
    assert text(two).count("95% interval") == 12
    assert "threads 2, query length 144, context 3,072" in text(two)

    data = json.loads(to_json(comparisons, ["processor differs"]))
    assert (data["schema"], data["schema_version"]) == ("fusion-bench compare", 2)
    assert data["warnings"] == ["processor differs"]
    (step,) = [row for row in data["comparisons"] if row["measure"] == DECODE_STEP]
    assert step["verdict"] == SLOWER
    assert step["ci95"][0] < step["ratio"] < step["ci95"][1]
    assert step["case"]["context"] == 1000


def test_results_that_cannot_be_compared() -> None:
    one = samples.case_result(CASE)
    with pytest.raises(FusionError, match=r"no case in common: .*context 1,000 and cpu, .*context 7"):
        compare(samples.result([one]), samples.result([samples.case_result(samples.case(context=7))]))
    with pytest.raises(FusionError, match=r"the case cpu, threads 2.* twice; measure it again"):
        compare(samples.result([one, one]), samples.result([one]))
    with pytest.raises(FusionError, match=r"'TTFT' of cpu, threads 2.* has a time of 0; expected times above 0"):
        compare(with_first_tokens(*[0.0] * 9), with_first_tokens(*[1.0] * 9))
