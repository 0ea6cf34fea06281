"""Measuring a bundle on one device: load it, time every case, and hold the medians against the limits."""

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
from fusion_edge.benchmarks.latency.machine.memory import MemoryRecorder, Timeline, device_memory, resident
from fusion_edge.benchmarks.latency.machine.nvidia import Gpu
from fusion_edge.benchmarks.latency.machine.procfs import ROOT
from fusion_edge.benchmarks.latency.peaks import MemoryReader, probe
from fusion_edge.benchmarks.latency.result import Case, Energy, Measured, Memory, Rates
from fusion_edge.benchmarks.latency.roofline import limits
from fusion_edge.benchmarks.latency.stages import Question, Times, for_case, measure, prefill, question, run_steps
from fusion_edge.benchmarks.latency.statistics import summarize
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.system.progress import Progress

ENERGY_SECONDS = energy.SHORTEST_WINDOW + 2


@dataclass(frozen=True)
class Wanted:
    """What to measure; tuples make a matrix. 0 positions and no lengths are the bundle's or the question's own."""

    picture: Path
    """Its file."""
    ask: str | None = None
    prompt_tokens: tuple[int, ...] = (0,)
    new_tokens: tuple[int, ...] = (32,)
    context: tuple[int, ...] = (0,)
    query_lengths: tuple[int, ...] = ()
    image_tokens: tuple[int, ...] = ()
    seconds: float = 60.0
    """For a case at the most, if its medians are not known sooner."""
    duration: float | None = None
    """Seconds that a case goes on whatever is known."""


@dataclass(frozen=True)
class Run:
    """What was seen of a case."""

    case: Case
    remark: str | None
    positions: int
    """Of the cache, that a step reads."""
    load_seconds: float
    times: Times
    bandwidth: float | None
    """Bytes a second that a CPU read beside the steps."""
    memory: Memory
    device_memory: Memory | None
    energy: Energy | None


def bench(bundle: Bundle, device: str, threads: int, wanted: Wanted, gpu: Gpu | None) -> list[Run]:
    """Every case on a device. Raises :class:`UsageError` for one that the bundle cannot have, before any is run."""
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
            question(for_case(fusion, case), case, wanted.picture, wanted.ask)
            for case in _cases(fusion, threads, wanted)
        ]
        # TensorRT's attention reads the whole cache, whose mask hides what is not used.
        capacity = fusion.max_context if fusion.device.name.startswith("tensorrt") else None
        runs = []
        kept = resident()
        reader = stack.enter_context(MemoryReader(threads)) if fusion.device.name == "cpu" else None
        apart = 0 if reader is None else resident() - kept
        for number, (asked, case) in enumerate(cases, 1):
            label = f"Measuring on {case.device}, {number} of {len(cases)}"
            of_case = for_case(fusion, case)
            if reader is not None:
                reader.begin()
            with MemoryRecorder(gpu) as recorder:
                times = _times(of_case, case, asked, wanted, label, reader)
            memory = _memory(loading.process, recorder.process, apart=apart)
            on_device = None if before is None else _memory(loading.device, recorder.device, before)
            spent = _energy(of_case, case, asked, times, gpu)
            positions, remark = capacity or case.context, fusion.device.remark
            bandwidth = statistics.median(reader.rates) if reader is not None else None
            runs.append(Run(case, remark, positions, seconds, times, bandwidth, memory, on_device, spent))
    return runs


def _cases(fusion: Fusion, threads: int, wanted: Wanted) -> Iterator[Case]:
    lengths = [fusion.query_length(length) for length in wanted.query_lengths or (None,)]
    images = wanted.image_tokens or (fusion.manifest.image_side**2,)
    matrix = product(lengths, images, wanted.prompt_tokens, wanted.new_tokens, wanted.context)
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


def _memory(loading: Timeline, case: Timeline, before: int = 0, apart: int = 0) -> Memory:
    """``before``: bytes that were in use without the bundle; ``apart``: beside the case. They do not count."""
    others = before + apart
    return Memory(
        loaded=int(loading.pairs[-1][1]) - before,
        load_peak=loading.largest - before,
        steady=int(case.pairs[-1][1]) - others,
        peak=case.largest - others,
        over_time=tuple((seconds, size - others) for seconds, size in case.pairs),
    )


def _times(
    fusion: Fusion, case: Case, asked: Question, wanted: Wanted, label: str, reader: MemoryReader | None
) -> Times:
    seconds = wanted.seconds if wanted.duration is None else wanted.duration
    started = told = time.perf_counter()
    with Progress(label, round(1000 * seconds), unit=None) as progress:

        def after_round(times: Times) -> bool:
            nonlocal told
            now = time.perf_counter()
            progress.advance(round(1000 * (now - told)))
            told = now
            is_over = now - started >= seconds
            return is_over or (wanted.duration is None and times.all_known)

        return measure(fusion, case, asked, after_round, None if reader is None else reader.look)


def _energy(fusion: Fusion, case: Case, asked: Question, times: Times, gpu: Gpu | None) -> Energy | None:
    """Of steps alone, as many as last for a window."""
    seconds = times.summary("step").median + times.summary("sampling").median
    steps = min(math.ceil(ENERGY_SECONDS / seconds), fusion.max_context - case.context)
    if not energy.sources(gpu, ROOT) or steps * seconds < energy.SHORTEST_WINDOW:
        return None
    prefill(fusion, case, asked, steps)
    with energy.EnergyMeter(gpu) as meter:
        run_steps(fusion, steps, Sampler(Sampling()), Times())
    return meter.energy(steps)


def device_rates(device: str, threads: int, runs: Sequence[Run]) -> Rates:
    """What a device reaches by its probe, and a CPU's memory by what its runs saw of it."""
    rates = probe(device, threads)
    seen = [run.bandwidth for run in runs if run.case.device == device and run.bandwidth is not None]
    return replace(rates, bandwidth=statistics.median(seen)) if seen else rates


def measured(manifest: Manifest, run: Run, rates: Rates) -> Measured:
    """Beside what the device reaches by its probe, which needs the memory that the bundle had, so it comes after.

    A step's limit on a CPU is by the bandwidth that was seen beside the steps.
    """
    if run.bandwidth is not None:
        rates = replace(rates, bandwidth=run.bandwidth)
    times = run.times
    stages = {name: times.summary(name) for name in times.stages}
    step = stages["step"]
    return Measured(
        case=run.case,
        remark=run.remark,
        load_seconds=run.load_seconds,
        stages=stages,
        first_token=summarize(times.first_token),
        further_first_token=summarize(times.further_first_token),
        tokens_per_second=1 / (step.median + stages["sampling"].median),
        answer_seconds=summarize(times.answer),
        jitter=step.p99 / step.median - 1,
        is_noisy=not times.all_known,
        limits=limits(manifest, run.case, run.positions, rates, step.median, stages["prefill"].median),
        memory=run.memory,
        device_memory=run.device_memory,
        energy=run.energy,
    )
