"""Synthetic results of ``fusion-bench`` for a machine with two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fusion_edge.benchmarks.latency.machine.energy import EnergyUse
from fusion_edge.benchmarks.latency.machine.info import MachineInfo
from fusion_edge.benchmarks.latency.machine.memory import MemoryUse
from fusion_edge.benchmarks.latency.result import (
    IMAGE_DECODE,
    SCHEMA,
    BenchResult,
    BundleInfo,
    Case,
    CaseResult,
    Peaks,
    RooflineUse,
    Utilization,
)
from fusion_edge.benchmarks.latency.statistics import summarize
from fusion_edge.runtime.stages import (
    ALIGNMENT,
    DECODE_STEP,
    ENCODE_GLOBAL,
    ENCODE_LOCAL,
    PREFILL,
    PREPROCESS,
    SAMPLING,
)

BANDWIDTH, COMPUTE = 33.4e9, 4.9e11
_STAGES = {
    IMAGE_DECODE: 0.0061,
    PREPROCESS: 0.0432,
    ENCODE_GLOBAL: 4.61,
    ALIGNMENT: 0.92,
    ENCODE_LOCAL: 1.18,
    PREFILL: 9.7,
    SAMPLING: 0.00021,
}
"""Seconds."""


def case(**options: int | str) -> Case:
    """Return a case of the 3B layout with some fields replaced."""
    defaults = Case("cpu", 2, 144, 576, 900, 128, 1000)
    return Case(**{**vars(defaults), **options})


def times(median: float, count: int = 25, noise: float = 0.01, seed: int = 0) -> tuple[float, ...]:
    """Return times around a median, with the tail of slow ones that other processes cause."""
    generator = np.random.default_rng(seed)
    tail = generator.exponential(2 * noise, count) * (generator.random(count) < 0.1)
    return tuple((median * (1 + noise * generator.standard_normal(count) + tail)).clip(median / 2).tolist())


def case_result(
    one: Case, speed: float = 1.0, noise: float = 0.01, seed: int = 0, steps: int = 400, joules: float | None = None
) -> CaseResult:
    """Return a result; ``speed`` 2 halves the times."""
    share = {name: seconds / speed for name, seconds in _STAGES.items()}
    share[PREFILL] *= one.prompt_tokens / 900
    step_bytes = int(1.9e9 + 2 * 32 * 3072 * one.context)
    step = 0.071 * step_bytes / 2.1e9 / speed
    seeds = iter(range(1000 * seed, 1000 * seed + 1000))
    stages = {name: summarize(times(seconds, noise=noise, seed=next(seeds))) for name, seconds in share.items()}
    sampling = stages.pop(SAMPLING)
    stages |= {DECODE_STEP: summarize(times(step, steps, noise, next(seeds))), SAMPLING: sampling}
    followup = sum(share[name] for name in (PREPROCESS, ENCODE_LOCAL, PREFILL, SAMPLING)) + 0.011
    first = sum(share.values()) + 0.03
    macs = 3_700_000_000 * one.prompt_tokens
    timeline = [(t / 4, 2.3e9 + (3e8 if t % 30 > 20 else 0.0)) for t in range(240)]
    return CaseResult(
        case=one,
        remark=None,
        load_seconds=5.3,
        stages=stages,
        ttft=summarize(times(first, noise=noise, seed=next(seeds))),
        followup_ttft=summarize(times(followup, noise=noise, seed=next(seeds))),
        decode_tokens_per_second=1 / (stages[DECODE_STEP].p50 + sampling.p50),
        answer=summarize(times(first + one.new_tokens * step, noise=noise, seed=next(seeds))),
        jitter=stages[DECODE_STEP].p99 / stages[DECODE_STEP].p50 - 1,
        is_noisy=not all(stage.is_precise for stage in stages.values()),
        roofline=RooflineUse(
            decode=utilization(step_bytes, BANDWIDTH, stages[DECODE_STEP].p50),
            prefill=utilization(macs, COMPUTE, stages[PREFILL].p50),
        ),
        memory=MemoryUse(
            loaded=2_300_000_000,
            load_peak=2_450_000_000,
            steady=2_310_000_000,
            peak=2_600_000_000,
            over_time=tuple(timeline),
        ),
        device_memory=None,
        energy=EnergyUse("ina3221", 8.4, 8.4 * 23, joules) if joules is not None else None,
    )


def utilization(work: int, peak: float, seconds: float) -> Utilization:
    """Return the utilization of a stage that takes ``seconds``."""
    return Utilization(work, work / peak, work / peak / seconds)


def result(
    cases: Sequence[CaseResult] | None = None, source: str = "FUSION-X-Phi3.5-3B", processor: str = "AMD EPYC 9R14"
) -> BenchResult:
    """Return a result of the given cases, by default of one."""
    return BenchResult(
        schema=SCHEMA.name,
        schema_version=SCHEMA.version,
        producer="fusion-edge 0.1.0",
        created="2026-03-01T12:00:00Z",
        command="fusion-bench fusion-3b --prompt-tokens 900 --context 1000 --json a.json --html a.html",
        bundle=BundleInfo(source, "cpu", "int4 g128, kv cache int8", 2_190_000_000, "3f9a" * 16, 4096),
        machine=MachineInfo(
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
        peaks={one.case.device: Peaks(BANDWIDTH, COMPUTE, {}) for one in cases or [case_result(case())]},
        cases=(case_result(case()),) if cases is None else tuple(cases),
    )


def on_gpu() -> BenchResult:
    """Return a result on a throttled GPU, without a compute roofline."""
    one = case_result(case(device="tensorrt"), speed=20, joules=0.53)
    over_time = ((0.0, 2.6e9), (3.0, 2.7e9), (9.0, 2.65e9))
    memory = MemoryUse(2_600_000_000, 2_900_000_000, 2_650_000_000, 2_700_000_000, over_time)
    decode = utilization(one.roofline.decode.work, 20 * BANDWIDTH, one.stages[DECODE_STEP].p50)
    use = RooflineUse(decode, Utilization(one.roofline.prefill.work, None, None))
    on_cpu = result([replace(one, roofline=use, device_memory=memory)])
    machine = replace(on_cpu.machine, gpu="NVIDIA Orin", power_mode="MAXN", throttled="thermal")
    peaks = {"tensorrt": Peaks(20 * BANDWIDTH, None, {"compute": "An engine would be needed."})}
    return replace(on_cpu, machine=machine, peaks=peaks)


def of_few_stages() -> BenchResult:
    """Return a result without an image, and with medians of three values."""
    one = case_result(case(query_length=0, image_tokens=0))
    return result(
        [
            replace(
                one,
                stages={name: one.stages[name] for name in (PREFILL, DECODE_STEP, SAMPLING)},
                ttft=summarize(times(9.8, count=3)),
                followup_ttft=summarize(times(9.7, count=3)),
            )
        ]
    )


def matrix() -> BenchResult:
    """Return a dozen cases, one of them noisy: threads, query lengths and contexts."""
    options = [
        {"threads": threads, "query_length": query, "context": context}
        for threads in (1, 2)
        for query in (16, 144)
        for context in (256, 1024, 3072)
    ]
    return result(
        [
            case_result(case(**one), 0.3 + 0.35 * one["threads"], noise=0.15 if i == 4 else 0.01, seed=i, joules=4.2)
            for i, one in enumerate(options)
        ]
    )
