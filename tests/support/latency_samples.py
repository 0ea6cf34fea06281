"""Results of ``fusion-bench`` as a machine with two cores would give them, made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fusion_edge.benchmarks.latency.result import (
    SCHEMA_VERSION,
    BundleFacts,
    Case,
    Energy,
    Limit,
    Limits,
    Machine,
    Measured,
    Memory,
    Rates,
    Result,
)
from fusion_edge.benchmarks.latency.statistics import is_known, summarize

BANDWIDTH, MULTIPLICATIONS = 33.4e9, 4.9e11
_STAGES = {
    "image decode": 0.0061,
    "preprocess": 0.0432,
    "vision of the image": 4.61,
    "alignment": 0.92,
    "vision of the question": 1.18,
    "prefill": 9.7,
    "sampling": 0.00021,
}
"""Seconds."""


def case(**options: int | str) -> Case:
    """Of the 3B layout; ``options`` are fields that differ."""
    defaults = Case("cpu", 2, 144, 576, 900, 128, 1000)
    return Case(**{**vars(defaults), **options})


def times(median: float, count: int = 25, noise: float = 0.01, seed: int = 0) -> tuple[float, ...]:
    """Around the median, with a tail of slow ones as other programs cause it."""
    generator = np.random.default_rng(seed)
    tail = generator.exponential(2 * noise, count) * (generator.random(count) < 0.1)
    return tuple((median * (1 + noise * generator.standard_normal(count) + tail)).clip(median / 2).tolist())


def measured(
    one: Case, speed: float = 1.0, noise: float = 0.01, seed: int = 0, steps: int = 400, joules: float | None = None
) -> Measured:
    """``speed`` 2 takes half the time."""
    share = {name: seconds / speed for name, seconds in _STAGES.items()}
    share["prefill"] *= one.prompt_tokens / 900
    step_bytes = int(1.9e9 + 2 * 32 * 3072 * one.context)
    step = 0.071 * step_bytes / 2.1e9 / speed
    seeds = iter(range(1000 * seed, 1000 * seed + 1000))
    stages = {name: summarize(times(seconds, noise=noise, seed=next(seeds))) for name, seconds in share.items()}
    sampling = stages.pop("sampling")
    stages |= {"step": summarize(times(step, steps, noise, next(seeds))), "sampling": sampling}
    further = sum(share[name] for name in ("preprocess", "vision of the question", "prefill", "sampling")) + 0.011
    first = sum(share.values()) + 0.03
    multiplications = 3_700_000_000 * one.prompt_tokens
    timeline = [(t / 4, 2.3e9 + (3e8 if t % 30 > 20 else 0.0)) for t in range(240)]
    return Measured(
        case=one,
        remark=None,
        load_seconds=5.3,
        stages=stages,
        first_token=summarize(times(first, noise=noise, seed=next(seeds))),
        further_first_token=summarize(times(further, noise=noise, seed=next(seeds))),
        tokens_per_second=1 / (stages["step"].median + sampling.median),
        answer_seconds=summarize(times(first + one.new_tokens * step, noise=noise, seed=next(seeds))),
        jitter=stages["step"].p99 / stages["step"].median - 1,
        is_noisy=not all(map(is_known, stages.values())),
        limits=Limits(
            step=limit(step_bytes, BANDWIDTH, stages["step"].median),
            prefill=limit(multiplications, MULTIPLICATIONS, stages["prefill"].median),
        ),
        memory=Memory(
            loaded=2_300_000_000,
            load_peak=2_450_000_000,
            steady=2_310_000_000,
            peak=2_600_000_000,
            over_time=tuple(timeline),
        ),
        device_memory=None,
        energy=Energy("ina3221", 8.4, 8.4 * 23, joules) if joules is not None else None,
    )


def limit(needed: int, rate: float, seconds: float) -> Limit:
    """Of a stage that takes so long."""
    return Limit(needed, needed / rate, needed / rate / seconds)


def result(
    cases: Sequence[Measured] | None = None, source: str = "FUSION-X-Phi3.5-3B", processor: str = "AMD EPYC 9R14"
) -> Result:
    """Of one case where none are given."""
    return Result(
        schema_version=SCHEMA_VERSION,
        producer="fusion-edge 0.1.0",
        created="2026-03-01T12:00:00Z",
        command="fusion-bench fusion-3b --prompt-tokens 900 --context 1000 --json a.json --html a.html",
        bundle=BundleFacts(source, "cpu", "int4 g128, kv cache int8", 2_190_000_000, "3f9a" * 16, 4096),
        machine=Machine(
            processor=processor,
            cores=2,
            memory=25_769_803_776,
            governor=None,
            load_average=0.21,
            gpu=None,
            power_mode=None,
            throttled=None,
            clocks={"processor": (1.5e9, 3.4e9, 3.7e9)},
            system="Linux 6.1.0 x86_64, Debian 12",
            versions={"python": "3.11.9", "onnxruntime": "1.23.0", "numpy": "2.2.1"},
        ),
        rates={one.case.device: Rates(BANDWIDTH, MULTIPLICATIONS, {}) for one in cases or [measured(case())]},
        measured=(measured(case()),) if cases is None else tuple(cases),
    )


def on_gpu() -> Result:
    """With what only a GPU tells, whose rate of products was not measured, and a machine that was too hot."""
    one = measured(case(device="tensorrt"), speed=20, joules=0.53)
    over_time = ((0.0, 2.6e9), (3.0, 2.7e9), (9.0, 2.65e9))
    memory = Memory(2_600_000_000, 2_900_000_000, 2_650_000_000, 2_700_000_000, over_time)
    step = limit(one.limits.step.needed, 20 * BANDWIDTH, one.stages["step"].median)
    limits = Limits(step, Limit(one.limits.prefill.needed, None, None))
    on_cpu = result([replace(one, limits=limits, device_memory=memory)])
    machine = replace(on_cpu.machine, gpu="NVIDIA Orin", power_mode="MAXN", throttled="thermal")
    rates = {"tensorrt": Rates(20 * BANDWIDTH, None, {"multiplications": "An engine would be needed."})}
    return replace(on_cpu, machine=machine, rates=rates)


def of_few_stages() -> Result:
    """Without an image, and a median of three values."""
    one = measured(case(query_length=0, image_tokens=0))
    return result(
        [
            replace(
                one,
                stages={name: one.stages[name] for name in ("prefill", "step", "sampling")},
                first_token=summarize(times(9.8, count=3)),
                further_first_token=summarize(times(9.7, count=3)),
            )
        ]
    )


def matrix() -> Result:
    """A dozen cases: threads, query lengths and contexts; one of them noisy."""
    options = [
        {"threads": threads, "query_length": query, "context": context}
        for threads in (1, 2)
        for query in (16, 144)
        for context in (256, 1024, 3072)
    ]
    return result(
        [
            measured(case(**one), 0.3 + 0.35 * one["threads"], noise=0.15 if i == 4 else 0.01, seed=i, joules=4.2)
            for i, one in enumerate(options)
        ]
    )
