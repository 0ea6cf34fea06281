"""Medians and confidence intervals, questions of given lengths, rounds of stages, rooflines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.benchmarks.latency import roofline
from fusion_edge.benchmarks.latency.result import STAGES, Case, Peaks, RooflineUse, Utilization
from fusion_edge.benchmarks.latency.stages import for_case, make_up_picture, measure, question
from fusion_edge.benchmarks.latency.statistics import MIN_ROUNDS, Summary, repeat, summarize
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.stages import DECODE_STEP, ENCODE_LOCAL, PREFILL, PREPROCESS, SAMPLING


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60))
def test_summary(values: list[float]) -> None:
    summary = summarize(values)
    assert (summary.ci95 is None) == (len(values) < MIN_ROUNDS)
    low, high = summary.ci95 or (summary.min, summary.max)
    assert summary.min <= low <= summary.p50 <= high <= summary.max
    assert summary.p50 <= summary.p95 <= summary.p99 <= summary.max
    assert summary.p50 == pytest.approx(float(np.median(values)))
    assert summary.p95 == pytest.approx(float(np.percentile(values, 95)))
    assert summary.values == tuple(values)


@pytest.mark.parametrize("count", [7, 8, 16, 21, 101])
def test_the_interval_of_independent_values_is_exact(count: int) -> None:
    """The binomial probability that the median of 0, 1, 2, ... lies in the interval is at least 95%."""
    interval = summarize([float(value) for value in range(count)]).ci95
    assert interval is not None
    low, high = map(int, interval)
    assert low == count - 1 - high
    assert 0.95 <= sum(math.comb(count, below) for below in range(low + 1, high + 1)) / 2**count < 0.995


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("rounds", [7, 25])
def test_interval_of_the_median_has_its_nominal_coverage(rounds: int, shared: float) -> None:
    """Coverage of lognormal steps that share a part of their variance with their round."""
    size, generator = 16, np.random.default_rng(rounds)
    rounds_of, steps = generator.normal(size=(1500, rounds, 1)), generator.normal(size=(1500, rounds, size))
    samples = np.exp(np.sqrt(shared) * rounds_of + np.sqrt(1 - shared) * steps).reshape(1500, -1).tolist()
    assert 0.94 <= held([summarize(sample, rounds) for sample in samples]) < 1
    if shared:  # treating them as independent fails
        assert held([summarize(sample) for sample in samples]) < 0.8


def held(summaries: list[Summary]) -> float:
    """Return the share of intervals that contain 1."""
    intervals = np.array([summary.ci95 for summary in summaries])
    return float(((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)).mean())


def test_repeating_ends_when_the_median_is_precise() -> None:
    assert len(repeat(lambda: 1.0, seconds=60)) == MIN_ROUNDS
    noise = iter(np.random.default_rng(0).uniform(1, 9, 10**6))
    values = repeat(lambda: next(noise), seconds=0.05)
    assert not summarize(values[:MIN_ROUNDS]).is_precise
    assert len(repeat(lambda: next(noise), seconds=0)) == 3


def test_warming_up_is_not_counted() -> None:
    calls: list[float] = []

    def measure() -> float:
        calls.append(time.perf_counter())
        return float(len(calls))

    started = time.perf_counter()
    values = repeat(measure, seconds=0, warm_up=0.02)
    assert values == [len(calls) - 2, len(calls) - 1, len(calls)]
    assert calls[len(calls) - 3] >= started + 0.02


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.jpg"
    make_up_picture(path)
    return path


@pytest.fixture(scope="module")
def fusion(tiny_bundle: Path) -> Iterator[Fusion]:
    with load(tiny_bundle, device="cpu", threads=1) as loaded:
        yield loaded


def case(fusion: Fusion, **values: int) -> Case:
    manifest = fusion.manifest
    lengths = {"prompt_tokens": 0, "new_tokens": 3, "context": 0, "image_tokens": manifest.image_side**2}
    return Case("cpu", 1, **({"query_length": 4} | lengths | values))


@pytest.mark.parametrize(("prompt", "context"), [(0, 0), (90, 0), (90, 120), (0, 200)])
def test_question_has_the_requested_lengths(fusion: Fusion, picture: Path, prompt: int, context: int) -> None:
    wanted = case(fusion, prompt_tokens=prompt, context=context)
    asked, got = question(fusion, wanted, picture, None)
    lengths = [p.layout(got.image_tokens, got.query_length).length for p in (asked.prompt, asked.long_prompt)]
    assert lengths == [got.prompt_tokens, got.context]
    assert got.prompt_tokens == prompt or not prompt
    assert got.context == context or not context
    layout = asked.long_prompt.layout(got.image_tokens, got.query_length)
    assert layout.instruct_positions.tolist() == [layout.length - 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_tokens": 10}, "--prompt-tokens 10 is too small; image, latents and question need"),
        ({"prompt_tokens": 100, "context": 99}, "--context 99 is less than the prompt's 100 tokens"),
        ({"context": 510}, "A context of 510 and 3 new tokens exceed the limit of 512 tokens"),
        ({"image_tokens": 5}, "--image-tokens 5 is not a square number up to 16"),
        ({"image_tokens": 25}, "--image-tokens 25 is not a square number up to 16"),
    ],
)
def test_impossible_lengths_are_refused(fusion: Fusion, picture: Path, values: dict[str, int], message: str) -> None:
    wanted = case(fusion, **values)
    with pytest.raises(UsageError, match=message):
        question(for_case(fusion, wanted), wanted, picture, None)


def test_every_stage_is_timed(fusion: Fusion, picture: Path) -> None:
    asked, wanted = question(fusion, case(fusion, context=120), picture, "How many?")
    times = measure(fusion, wanted, asked, lambda _: True)
    assert list(times.stages) == list(STAGES)
    rounds = len(times.ttft)
    assert rounds == 3
    counts = {stage: len(values) // rounds for stage, values in times.stages.items()}
    assert counts == dict.fromkeys(STAGES[:4], 1) | {
        PREPROCESS: 2,
        ENCODE_LOCAL: 2,
        PREFILL: 2,
        DECODE_STEP: wanted.new_tokens,
        SAMPLING: 2 + wanted.new_tokens,
    }
    assert all(value > 0 for values in times.stages.values() for value in values)
    once, twice = STAGES[:1] + STAGES[2:4], (PREPROCESS, ENCODE_LOCAL, PREFILL)
    for i in range(rounds):
        first = sum(times.stages[stage][i] for stage in once) + sum(times.stages[stage][2 * i] for stage in twice)
        assert times.ttft[i] > first
        assert times.followup_ttft[i] > sum(times.stages[stage][2 * i + 1] for stage in twice)
    assert all(answer > first for answer, first in zip(times.answer, times.ttft, strict=True))


def test_followup_question_encodes_no_global_crops(
    fusion: Fusion, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, wanted = question(fusion, case(fusion), picture, None)
    crops: list[int] = []
    encode = fusion.backend.encode

    def counted(pixels: np.ndarray, *rest: np.ndarray) -> object:
        crops.append(len(pixels))
        return encode(pixels, *rest)

    monkeypatch.setattr(fusion.backend, "encode", counted)
    measure(fusion, wanted, asked, lambda _: True)
    assert crops == [4, 1, 1] * 4


def test_roofline(fusion: Fusion) -> None:
    manifest = replace(fusion.manifest, weights=dict.fromkeys(fusion.manifest.weights, "fp32"))
    model = manifest.model
    width, mlp, layers = model.language.hidden_size, model.language.mlp_width, model.language.layers
    decoder, head = layers * (4 * width * width + 3 * width * mlp), width * model.language.vocab_size
    assert roofline.weight_bytes(manifest) == 4 * (decoder + head)
    wanted = case(fusion, prompt_tokens=100, context=150)
    interaction = model.alignment.layers * width * width
    attention = layers * width * 100 * 101
    expected = 100 * decoder + head + interaction * (1 + 5 * wanted.query_length) + attention
    assert roofline.prefill_macs(manifest, wanted) == expected
    found = roofline.roofline_use(manifest, wanted, 150, Peaks(1e9, 1e10, {}), decode_seconds=0.5, prefill_seconds=2.0)
    assert found.decode.work == 4 * (decoder + head) + 2 * layers * width * 4 * 150
    assert found.decode.share == pytest.approx(found.decode.work / 1e9 / 0.5)
    assert found.prefill == Utilization(expected, expected / 1e10, expected / 1e10 / 2)
    unknown = roofline.roofline_use(
        manifest, wanted, 150, Peaks(None, None, {}), decode_seconds=0.5, prefill_seconds=2.0
    )
    assert unknown == RooflineUse(Utilization(found.decode.work, None, None), Utilization(expected, None, None))
