"""Percentiles of latencies."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.runtime.loop.latencies import WINDOW, LatencyRecorder, Percentiles, percentiles


def test_nothing_has_no_percentiles() -> None:
    figures = LatencyRecorder().latencies()
    assert all(math.isnan(value) for value in vars(figures.total_ms).values())
    assert (figures.answered, figures.late, figures.failed) == (0, 0, 0)


def test_nearest_rank() -> None:
    assert percentiles(deque(second / 1000 for second in range(100, 0, -1))) == Percentiles(50, 95, 99)
    assert percentiles(deque([0.25])) == Percentiles(250, 250, 250)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=200))
def test_equals_numpy(milliseconds: list[int]) -> None:
    found = percentiles(deque(value / 1024 for value in milliseconds))  # exact in binary
    expected = np.percentile(milliseconds, [50, 95, 99], method="inverted_cdf") * 1000 / 1024
    assert [found.p50, found.p95, found.p99] == expected.tolist()


def test_the_latest_answers_count() -> None:
    recorder = LatencyRecorder()
    for _ in range(WINDOW):
        recorder.record(9.0, None, 9.0)
    assert math.isnan(recorder.latencies().first_token_ms.p50)
    for _ in range(WINDOW):
        recorder.record(0.125, 0.25, 0.5)
    figures = recorder.latencies()
    assert (figures.wait_ms.p99, figures.first_token_ms.p99, figures.total_ms.p99) == (125, 250, 500)


def test_text() -> None:
    recorder = LatencyRecorder()
    recorder.record(0.01, None, 0.5)
    recorder.count("answered")
    recorder.count("late")
    text = "wait 10/10/10 ms, first token nan/nan/nan ms, total 500/500/500 ms (p50/p95/p99), 1 answered, 1 late"
    assert str(recorder.latencies()) == text
