"""Measuring a bundle on one device: load it, time every case, and hold the medians against the limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from fusion_edge.benchmarks.latency import energy
from fusion_edge.benchmarks.latency.limits import limits
from fusion_edge.benchmarks.latency.memory import MemoryRecorder, device_memory, resident
from fusion_edge.benchmarks.latency.nvidia import Gpu
from fusion_edge.benchmarks.latency.result import Case, Energy, Measured, Memory, Rates
from fusion_edge.benchmarks.latency.stages import Question, Times, for_case, measure, prefill_and_step, question
from fusion_edge.benchmarks.latency.statistics import summarize
from fusion_edge.benchmarks.latency.system_files import ROOT
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.bundle import Bundle
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.progress import Progress

ENERGY_SECONDS = energy.SHORTEST_WINDOW + 1


@dataclass(frozen=True)
class Wanted:
    """What to measure; tuples make a matrix. 0 positions and no lengths are the bundle's or the question's own."""

    picture: bytes
    """A picture's file."""
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


def bench(bundle: Bundle, device: str, threads: int, wanted: Wanted, rates: Rates, gpu: Gpu | None) -> list[Measured]:
    """Every case on a device. Raises :class:`UsageError` for a case that the bundle cannot have, before any is run."""
    before = None if gpu is None else device_memory(gpu)
    with MemoryRecorder() as recorder:
        started = time.perf_counter()
        with load(bundle.folder, device=device, threads=threads) as fusion:
            load_seconds, loaded = time.perf_counter() - started, resident()
            gpu = None if fusion.device.name == "cpu" else gpu
            cases = [
                question(for_case(fusion, case), case, wanted.picture, wanted.ask)
                for case in _cases(fusion, threads, wanted)
            ]
            measured = []
            for number, (asked, case) in enumerate(cases, 1):
                label = f"Measuring on {case.device}, {number} of {len(cases)}"
                times = _times(for_case(fusion, case), case, asked, wanted, label)
                used = None if gpu is None or before is None else (device_memory(gpu) or 0) - before
                history = tuple((seconds, float(size)) for seconds, size in recorder.over_time)
                memory = Memory(loaded, resident(), recorder.peak, used, history)
                spent = _energy(for_case(fusion, case), case, asked, gpu)
                measured.append(_measured(fusion, case, times, load_seconds, memory, rates, spent))
    return measured


def _cases(fusion: Fusion, threads: int, wanted: Wanted) -> Iterator[Case]:
    manifest = fusion.manifest
    lengths = wanted.query_lengths or manifest.query_lengths[:1]
    if unknown := set(lengths) - set(manifest.query_lengths):
        offered = ", ".join(map(str, manifest.query_lengths))
        raise UsageError(f"Query length {min(unknown)} is not offered by this bundle; choose from {offered}.")
    images = wanted.image_tokens or (manifest.image_side**2,)
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


def _times(fusion: Fusion, case: Case, asked: Question, wanted: Wanted, label: str) -> Times:
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

        return measure(fusion, case, asked, after_round)


def _energy(fusion: Fusion, case: Case, asked: Question, gpu: Gpu | None) -> Energy | None:
    """Of prompts and their steps, a window long."""
    if not energy.sources(gpu, ROOT):
        return None
    tokens = 0
    with energy.EnergyMeter(gpu) as meter:
        end = time.perf_counter() + ENERGY_SECONDS
        while time.perf_counter() < end:
            prefill_and_step(fusion, case, asked)
            tokens += case.new_tokens
    return meter.energy(tokens)


def _measured(
    fusion: Fusion,
    case: Case,
    times: Times,
    load_seconds: float,
    memory: Memory,
    rates: Rates,
    spent: Energy | None,
) -> Measured:
    stages = {name: summarize(values) for name, values in times.stages.items()}
    step, sampling = stages["step"], stages["sampling"]
    prefill = stages["prefill"].median
    return Measured(
        case=case,
        load_seconds=load_seconds,
        stages=stages,
        first_token=summarize(times.first_token),
        further_first_token=summarize(times.further_first_token),
        tokens_per_second=1 / (step.median + sampling.median),
        answer_seconds=summarize(times.answer),
        jitter=step.p99 / step.median - 1,
        is_noisy=not times.all_known,
        limits=limits(fusion.manifest, case, rates, step.median, prefill) if case.device == "cpu" else None,
        memory=memory,
        energy=spent,
    )
