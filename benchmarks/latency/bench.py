"""Run every case of a bundle on one device, and compare the medians with the rooflines."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from fusion_edge.benchmarks.latency.machine import energy
from fusion_edge.benchmarks.latency.machine.energy import EnergyUse
from fusion_edge.benchmarks.latency.machine.memory import MemoryRecorder, MemoryUse, Timeline, device_memory, resident
from fusion_edge.benchmarks.latency.machine.nvidia import Gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT
from fusion_edge.benchmarks.latency.peaks import BandwidthReader, measure_peaks
from fusion_edge.benchmarks.latency.result import Case, CaseResult, Peaks
from fusion_edge.benchmarks.latency.roofline import roofline_use
from fusion_edge.benchmarks.latency.stages import TimedQuestion, Times, for_case, measure, prefill, question, run_steps
from fusion_edge.benchmarks.latency.statistics import summarize
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.stages import DECODE_STEP, PREFILL, SAMPLING
from fusion_edge.runtime.system.progress import Progress

ENERGY_SECONDS = energy.MIN_WINDOW + 2


@dataclass(frozen=True)
class BenchConfig:
    """What to measure. Tuples make a matrix of cases; 0 tokens and empty tuples mean the bundle's default."""

    picture: Path
    """Image file."""
    ask: str | None = None
    """Question to ask; None for a short default."""
    prompt_tokens: tuple[int, ...] = (0,)
    new_tokens: tuple[int, ...] = (32,)
    context: tuple[int, ...] = (0,)
    query_lengths: tuple[int, ...] = ()
    image_tokens: tuple[int, ...] = ()
    seconds: float = 60.0
    """Upper limit of a case, if its medians are not precise earlier."""
    duration: float | None = None
    """Fixed seconds of a case, for soak tests."""


@dataclass(frozen=True)
class CaseRun:
    """Raw measurements of a case."""

    case: Case
    remark: str | None
    cached_tokens: int
    """Number of tokens of the KV cache that a decode step reads."""
    load_seconds: float
    times: Times
    bandwidth: float | None
    """Bytes per second that the CPU read between decode steps."""
    memory: MemoryUse
    device_memory: MemoryUse | None
    energy: EnergyUse | None


def bench(bundle: Bundle, device: str, threads: int, config: BenchConfig, gpu: Gpu | None) -> list[CaseRun]:
    """Run every case on a device. Raises :class:`UsageError` before the first run for a case the bundle cannot have."""
    before = None if gpu is None else device_memory(gpu)
    with MemoryRecorder(gpu) as loading:
        started = time.perf_counter()
        fusion = load(bundle.folder, device=device, threads=threads)
        seconds = time.perf_counter() - started
    with ExitStack() as stack:
        stack.enter_context(fusion)
        if fusion.device.name == "cpu":
            gpu = before = None
        cases = [
            question(for_case(fusion, case), case, config.picture, config.ask)
            for case in _cases(fusion, threads, config)
        ]
        # TensorRT's attention reads the whole allocated cache and masks the unused part.
        capacity = fusion.max_context if fusion.device.name.startswith("tensorrt") else None
        runs = []
        without_reader = resident()
        reader = stack.enter_context(BandwidthReader(threads)) if fusion.device.name == "cpu" else None
        reader_bytes = 0 if reader is None else resident() - without_reader
        for number, (asked, case) in enumerate(cases, 1):
            label = f"Measuring on {case.device}, case {number} of {len(cases)}"
            of_case = for_case(fusion, case)
            if reader is not None:
                reader.begin()
            with MemoryRecorder(gpu) as recorder:
                times = _times(of_case, case, asked, config, label, reader)
            memory = _memory(loading.process, recorder.process, reader=reader_bytes)
            on_device = None if before is None else _memory(loading.device, recorder.device, before)
            spent = _energy(of_case, case, asked, times, gpu)
            cached_tokens, remark = capacity or case.context, fusion.device.remark
            bandwidth = statistics.median(reader.rates) if reader is not None else None
            runs.append(CaseRun(case, remark, cached_tokens, seconds, times, bandwidth, memory, on_device, spent))
    return runs


def _cases(fusion: Fusion, threads: int, config: BenchConfig) -> Iterator[Case]:
    lengths = [fusion.query_length(length) for length in config.query_lengths or (None,)]
    images = config.image_tokens or (fusion.manifest.image_side**2,)
    matrix = product(lengths, images, config.prompt_tokens, config.new_tokens, config.context)
    for query_length, image_tokens, prompt_tokens, new_tokens, context in dict.fromkeys(matrix):
        yield Case(
            device=fusion.device.name,
            threads=threads,
            query_length=query_length,
            image_tokens=image_tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            context=context,
        )


def _memory(loading: Timeline, case: Timeline, before: int = 0, reader: int = 0) -> MemoryUse:
    """Subtract the bytes in use ``before`` loading, and those of the bandwidth ``reader``."""
    others = before + reader
    return MemoryUse(
        loaded=int(loading.pairs[-1][1]) - before,
        load_peak=loading.largest - before,
        steady=int(case.pairs[-1][1]) - others,
        peak=case.largest - others,
        over_time=tuple((seconds, size - others) for seconds, size in case.pairs),
    )


def _times(
    fusion: Fusion, case: Case, asked: TimedQuestion, config: BenchConfig, label: str, reader: BandwidthReader | None
) -> Times:
    seconds = config.seconds if config.duration is None else config.duration
    started = reported = time.perf_counter()
    with Progress(label, round(1000 * seconds), unit=None) as progress:

        def is_done(times: Times) -> bool:
            nonlocal reported
            now = time.perf_counter()
            progress.advance(round(1000 * (now - reported)))
            reported = now
            is_over = now - started >= seconds
            return is_over or (config.duration is None and times.are_precise)

        return measure(fusion, case, asked, is_done, None if reader is None else reader.sample)


def _energy(fusion: Fusion, case: Case, asked: TimedQuestion, times: Times, gpu: Gpu | None) -> EnergyUse | None:
    """Measure a window of decode steps."""
    seconds = times.summary(DECODE_STEP).p50 + times.summary(SAMPLING).p50
    steps = min(math.ceil(ENERGY_SECONDS / seconds), fusion.max_context - case.context)
    if not energy.sources(gpu, ROOT) or steps * seconds < energy.MIN_WINDOW:
        return None
    prefill(fusion, case, asked, steps)
    with energy.EnergyMeter(gpu) as meter:
        run_steps(fusion, steps, Sampler(Sampling()), Times())
    return meter.energy(steps)


def device_peaks(device: str, threads: int, runs: Sequence[CaseRun]) -> Peaks:
    """Probe a device; a CPU's bandwidth is the median of those read during its runs.

    The probe needs as much memory as a bundle, so run it after the bundle is closed.
    """
    peaks = measure_peaks(device, threads)
    bandwidths = [run.bandwidth for run in runs if run.case.device == device and run.bandwidth is not None]
    return replace(peaks, bandwidth=statistics.median(bandwidths)) if bandwidths else peaks


def case_result(manifest: Manifest, run: CaseRun, peaks: Peaks) -> CaseResult:
    """Summarize a run against the rooflines; on a CPU the bandwidth is the one read during this run."""
    if run.bandwidth is not None:
        peaks = replace(peaks, bandwidth=run.bandwidth)
    times = run.times
    stages = {name: times.summary(name) for name in times.stages}
    step, prefill_time = stages[DECODE_STEP], stages[PREFILL]
    return CaseResult(
        case=run.case,
        remark=run.remark,
        load_seconds=run.load_seconds,
        stages=stages,
        ttft=summarize(times.ttft),
        followup_ttft=summarize(times.followup_ttft),
        decode_tokens_per_second=1 / (step.p50 + stages[SAMPLING].p50),
        answer=summarize(times.answer),
        jitter=step.p99 / step.p50 - 1,
        is_noisy=not times.are_precise,
        roofline=roofline_use(manifest, run.case, run.cached_tokens, peaks, step.p50, prefill_time.p50),
        memory=run.memory,
        device_memory=run.device_memory,
        energy=run.energy,
    )
