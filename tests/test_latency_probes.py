"""What the short probes of a machine count, and that they compute what they say."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from fusion_edge.benchmarks.latency import probes


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes half a second, as the median of three runs says."""

    def repeat(action: Callable[[], object], seconds: float) -> list[float]:
        action()
        return [0.4, 9.0, 0.5]

    monkeypatch.setattr(probes, "repeat", repeat)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("_clock")
def test_each_byte_counts_once(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(probes, "READ_BYTES", 12 << 20)
    read: list[float] = []
    inner = probes._read
    monkeypatch.setattr(probes, "_read", lambda part: read.append(float(inner(part).sum())))
    assert probes.bandwidth(threads) == (12 << 20) / 0.5
    assert len(read) == threads
    assert sum(read) == (12 << 20) / 8  # ones by ones, of 4 bytes each


@pytest.mark.usefixtures("_clock")
def test_a_multiply_add_counts_once() -> None:
    assert probes.multiplications(1) == probes.ROWS * probes.INPUTS * probes.OUTPUTS / 0.5


def test_the_product_is_that_of_the_weights() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (48, 2, 64), np.uint8)
    scales = rng.uniform(0.5, 2, (48, 2)).astype(np.float32)
    inputs = rng.normal(size=(5, 256)).astype(np.float32)
    (outputs,) = probes.product(values, scales, threads=1).run(None, {"x": inputs})
    nibbles = np.stack([values & 15, values >> 4], axis=-1).reshape(48, 2, 128).astype(np.float32) - 8
    exact = inputs @ (nibbles * scales[..., None]).reshape(48, 256).T
    error = np.abs(outputs - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2  # inputs were rounded to 8 bits


def test_a_short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SECONDS", 0.1)
    started = time.perf_counter()
    rates = probes.probe(2)
    assert time.perf_counter() - started < 10
    # Between a slow board and the fastest server.
    assert 1e9 < rates.bandwidth < 5e12
    assert 1e9 < rates.multiplications < 1e14
