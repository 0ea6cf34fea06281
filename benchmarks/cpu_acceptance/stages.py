"""Stages of the first question about an image, on every tier and with fewer threads."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion_edge.benchmarks.cpu_acceptance.goals import Goal
from fusion_edge.benchmarks.cpu_acceptance.kernels import AMX, BANDWIDTH_SHARE
from fusion_edge.benchmarks.latency import stages as latency
from fusion_edge.benchmarks.latency.peaks import BandwidthReader
from fusion_edge.benchmarks.latency.result import Case
from fusion_edge.benchmarks.latency.roofline import cache_bytes, weight_bytes
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.stages import ALIGNMENT, DECODE_STEP, ENCODE_GLOBAL, ENCODE_LOCAL, PREFILL, SAMPLING
from fusion_edge.runtime.system.progress import Progress
from fusion_edge.runtime.system.resources import usable_processors

STEPS = 24
FIRST_TOKEN = 5.0  # seconds, with AMX on two cores


@dataclass(frozen=True)
class StageResult:
    """Shortest times of the rounds of one tier, in seconds."""

    tier: str
    threads: int
    prompt_tokens: int
    vision: float
    """The five crops of an image and its question."""
    alignment: float
    prefill: float
    first_token: float
    decode_step: float
    """Median of the fastest round, sampling included."""
    bandwidth_share: float
    """Bytes of a decode step per second, as a share of the bandwidth that all threads read before or after it."""


def measure(bundle: Path, rounds: int) -> list[StageResult]:
    """Measure a bundle: all tiers with all threads, and the fastest tier with fewer.

    Raises:
        FusionError: Our kernels cannot run the bundle here.
    """
    results = []
    for threads in _thread_counts(usable_processors()):
        with load(bundle, device="cpu", threads=threads) as fusion:
            if reason := cpu_kernels.unsupported_reason(fusion.manifest):
                raise FusionError(f"The CPU kernels cannot run {bundle}. {reason}")
            tiers = cpu_kernels.tiers() if threads == usable_processors() else cpu_kernels.tiers()[-1:]
            results += _measure(fusion, threads, tiers, rounds)
    return results


def _thread_counts(processors: int) -> list[int]:
    """Return the powers of 2 below the number of processors, and that number, the largest first."""
    return [processors, *(1 << i for i in reversed(range(processors.bit_length())) if 1 << i < processors)]


def _measure(fusion: Fusion, threads: int, tiers: Sequence[str], rounds: int) -> list[StageResult]:
    with tempfile.TemporaryDirectory() as folder, BandwidthReader(threads) as reader:
        picture = Path(folder) / "picture.jpg"
        latency.make_up_picture(picture)
        lengths = fusion.query_length(None), fusion.manifest.image_side**2
        asked, case = latency.question(fusion, Case("cpu", threads, *lengths, 0, STEPS, 0), picture, None)
        results: dict[str, list[StageResult]] = {tier: [] for tier in tiers}
        _round(fusion, case, asked, tiers[-1], reader)  # reads the weights
        with Progress(f"Measuring with {threads} threads", rounds * len(tiers), None) as progress:
            for _ in range(rounds):
                for tier in tiers:
                    results[tier].append(_round(fusion, case, asked, tier, reader))
                    progress.advance(1)
    return [_best(ran) for ran in results.values()]


def _round(fusion: Fusion, case: Case, asked: latency.TimedQuestion, tier: str, reader: BandwidthReader) -> StageResult:
    cpu_kernels.use_tier(tier)
    sampler, times = Sampler(Sampling()), latency.Times()
    latency.first_token(fusion, case, asked, sampler, times)
    reader.begin()
    reader.sample()
    latency.run_steps(fusion, case.new_tokens, sampler, times)
    reader.sample()
    seconds = {stage: sum(times.stages[stage]) for stage in (ENCODE_GLOBAL, ENCODE_LOCAL, ALIGNMENT, PREFILL)}
    step = statistics.median(times.stages[DECODE_STEP])
    work = weight_bytes(fusion.manifest) + cache_bytes(fusion.manifest, case.context)
    return StageResult(
        tier=tier,
        threads=case.threads,
        prompt_tokens=case.prompt_tokens,
        vision=seconds[ENCODE_GLOBAL] + seconds[ENCODE_LOCAL],
        alignment=seconds[ALIGNMENT],
        prefill=seconds[PREFILL],
        first_token=times.ttft[0],
        decode_step=step + statistics.median(times.stages[SAMPLING]),
        bandwidth_share=work / step / max(reader.rates),
    )


def _best(ran: Sequence[StageResult]) -> StageResult:
    """Return the shortest time of each stage."""
    first = ran[0]
    return StageResult(
        tier=first.tier,
        threads=first.threads,
        prompt_tokens=first.prompt_tokens,
        vision=min(one.vision for one in ran),
        alignment=min(one.alignment for one in ran),
        prefill=min(one.prefill for one in ran),
        first_token=min(one.first_token for one in ran),
        decode_step=min(one.decode_step for one in ran),
        bandwidth_share=max(one.bandwidth_share for one in ran),
    )


def goals(results: Sequence[StageResult]) -> Iterator[Goal]:
    """Yield the goals of the fastest tier with all threads."""
    fastest = [one for one in results if one.threads == results[0].threads][-1]
    name = f"{fastest.tier}, {fastest.threads} threads"
    if fastest.tier == AMX:
        yield Goal(f"first question to first token, {name}", fastest.first_token, FIRST_TOKEN, "s", is_upper=True)
    yield Goal(f"decode, {name}, share of the bandwidth read", fastest.bandwidth_share, BANDWIDTH_SHARE, "")


def rows(results: Sequence[StageResult]) -> list[tuple[str, ...]]:
    """Return a table of all results."""
    header = ("tier", "threads", "vision", "alignment", "prefill", "first token", "decode", "of the bandwidth")
    table: list[tuple[str, ...]] = [header]
    for one in results:
        seconds = (f"{value:.2f} s" for value in (one.vision, one.alignment, one.prefill, one.first_token))
        rate, share = f"{1 / one.decode_step:.1f} tokens/s", f"{one.bandwidth_share:.0%}"
        table.append((one.tier, str(one.threads), *seconds, rate, share))
    return table
