"""Single layers on every tier, against ONNX Runtime's kernels, on one core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusion_edge.benchmarks import cpu_kernels as layers
from fusion_edge.benchmarks.cpu_acceptance.goals import Goal
from fusion_edge.benchmarks.latency.peaks import BandwidthReader
from fusion_edge.quant.formats import WeightFormat

AMX = "AMX"
INT4 = WeightFormat("int4", 128)
OUTPUTS, INPUTS = 8192, 3072
SMALL_ROWS = (2, 4, 8, 16, 40, 64, 100, 170, 200)
"""Counts around those of a follow-up question behind a kept image prefix."""
MLP = (1152, 4304, 1152)
LLM = "Phi-3.5"
GEMM_RATE, ATTENTION_RATE = 2000, 500  # 10^9 operations per second of a core with AMX
BANDWIDTH_SHARE = 0.85


@dataclass(frozen=True)
class KernelResult:
    """Shortest times of one layer."""

    name: str
    unit: str
    seconds: Mapping[str, float]
    """By tier, and of ONNX Runtime."""
    rates: Mapping[str, float]
    """10^9 operations or bytes per second, by tier."""


@dataclass(frozen=True)
class Kernels:
    """All layers."""

    gemm: KernelResult
    small: Sequence[KernelResult]
    """GEMMs of :data:`SMALL_ROWS`."""
    integer: Sequence[KernelResult]
    """With calibrated 8-bit activations."""
    attention: Sequence[KernelResult]
    gemv: KernelResult
    read_rate: float
    """10^9 bytes per second that one thread reads before or after the GEMV."""

    def results(self) -> Iterator[KernelResult]:
        """Yield the results of all layers."""
        yield self.gemm
        yield from self.small
        yield from self.integer
        yield from self.attention
        yield self.gemv


def measure() -> Kernels:
    """Measure all layers on every tier of this processor.

    Raises:
        FusionError: Our kernels are not built, or cannot run here.
    """
    library = layers.expect_library()

    def result(case: layers.Case) -> KernelResult:
        seconds = case.measure(library, min)
        rates = {tier: case.work / time for tier, time in seconds.items()}
        return KernelResult(case.name, case.unit, seconds, rates)

    with BandwidthReader(1) as reader:
        (before,) = layers.seconds([reader.read], min)
        gemv = result(layers.linear_case(INT4, OUTPUTS, INPUTS, 1))
        (after,) = layers.seconds([reader.read], min)
        read_rate = reader.size / min(before, after) / 1e9
    return Kernels(
        gemm=result(layers.linear_case(INT4, OUTPUTS, INPUTS, layers.PROMPT)),
        small=[result(layers.linear_case(INT4, OUTPUTS, INPUTS, rows)) for rows in SMALL_ROWS],
        integer=[result(layers.integer_case(widths)) for widths in layers.INTEGER_LAYERS],
        attention=[result(layers.vision_attention_case()), result(layers.prefill_attention_case(LLM))],
        gemv=gemv,
        read_rate=read_rate,
    )


def goals(kernels: Kernels) -> Iterator[Goal]:
    """Yield the goals of the kernels: rates with AMX, and on every tier no GEMM slower than ONNX Runtime's."""
    if AMX in kernels.gemm.rates:
        yield Goal(f"{kernels.gemm.name}, {AMX}", kernels.gemm.rates[AMX], GEMM_RATE, kernels.gemm.unit)
        for one in kernels.attention:
            yield Goal(f"{one.name}, {AMX}", one.rates[AMX], ATTENTION_RATE, one.unit)
    tiers = [name for name in kernels.gemm.seconds if name != layers.ONNX_RUNTIME]
    for tier in tiers:
        slowest = min(kernels.small, key=lambda one: _speedup(one, tier))
        yield Goal(f"{slowest.name}, {tier}, speedup over ONNX Runtime", _speedup(slowest, tier), 1, "")
    share = kernels.gemv.rates[tiers[-1]] / kernels.read_rate
    yield Goal(f"{kernels.gemv.name}, {tiers[-1]}, share of the bandwidth read", share, BANDWIDTH_SHARE, "")


def _speedup(result: KernelResult, tier: str) -> float:
    return result.seconds[layers.ONNX_RUNTIME] / result.seconds[tier]


def rows(kernels: Kernels) -> list[tuple[str, ...]]:
    """Return a table: the rate of every layer in each kernel, and the speedup of the fastest tier."""
    names = list(kernels.gemm.rates)
    table: list[tuple[str, ...]] = [("layer, one core", *names, "", "speedup")]
    for one in kernels.results():
        rates = (f"{one.rates[name]:.1f}" for name in names)
        table.append((one.name, *rates, one.unit, f"{_speedup(one, names[-1]):.2f}"))
    table.append(("read, one thread", *("" for _ in names[1:]), f"{kernels.read_rate:.1f}", "GB/s", ""))
    return table
