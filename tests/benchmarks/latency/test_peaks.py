"""Probes of the rooflines: what they count and compute. GPU probes run on fakes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from fakes.fake_cuda import Error, FakeCuda

from fusion_edge.benchmarks.latency import peaks
from fusion_edge.benchmarks.latency.result import Peaks
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.errors import DeviceError

CPU_PROVIDER = "CPUExecutionProvider"


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every measurement return half a second, the median of three runs."""

    def repeat(measure: Callable[[], float], seconds: float) -> list[float]:
        measure()
        return [0.4, 9.0, 0.5]

    monkeypatch.setattr(peaks, "repeat", repeat)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("_clock")
def test_each_byte_counts_once(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(peaks, "READ_BYTES", 12 << 20)
    read: list[float] = []
    inner = peaks._read
    monkeypatch.setattr(peaks, "_read", lambda part: read.append(float(inner(part).sum())))
    with peaks.BandwidthReader(threads) as reader:
        read.clear()
        reader.read()
        assert reader.size == 12 << 20
    assert len(read) == threads
    assert sum(read) == (12 << 20) / 8  # ones by ones, of 4 bytes each


def test_bandwidth_samples_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "READ_BYTES", 12 << 20)
    monkeypatch.setattr(peaks, "QUIET", 0)
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr(peaks, "timed", lambda read: (read(), 0.5)[1])
    with peaks.BandwidthReader(2) as reader:
        for now, count in ((100.0, 1), (101.9, 1), (102.1, 2)):  # noqa: B007 (the clock reads it)
            reader.sample()
            assert reader.rates == [peaks.READS_PER_SAMPLE * (12 << 20) / 0.5] * count


def test_the_fastest_gemm_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each multiply-add counts once."""
    medians = iter([0.5, 0.25, 0.75])
    monkeypatch.setattr(peaks, "repeat", lambda measure, seconds: [next(medians)])
    monkeypatch.setattr(peaks, "OUTPUTS", 256)
    assert peaks.cpu_compute(1) == peaks.ROWS * peaks.INPUTS * 256 / 0.25


@pytest.mark.parametrize("use_kernels", [False, True])
def test_int4_gemm_matches_the_weights(use_kernels: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (48, 2, 64), np.uint8)
    scales = rng.uniform(0.5, 2, (48, 2)).astype(np.float32)
    inputs = rng.normal(size=(5, 256)).astype(np.float32)
    library = cpu_kernels.library() if use_kernels and cpu_kernels.library() and cpu_kernels.is_supported() else None
    if use_kernels and library is None:
        pytest.skip(f"our CPU kernels: not compiled, or this is not {cpu_kernels.processor_needed()}")
    (outputs,) = peaks.int4_gemm(values, scales, 1, library).run(None, {"x": inputs})
    nibbles = np.stack([values & 15, values >> 4], axis=-1).reshape(48, 2, 128).astype(np.float32) - 8
    exact = inputs @ (nibbles * scales[..., None]).reshape(48, 256).T
    error = np.abs(outputs - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2  # activations are quantized to 8 bits


def test_int8_gemm_is_exact() -> None:
    rng = np.random.default_rng(0)
    weights, inputs = rng.integers(-64, 64, (256, 48), np.int8), rng.integers(0, 128, (5, 256), np.uint8)
    (outputs,) = peaks.int8_gemm(weights, threads=1).run(None, {"x": inputs})
    assert outputs.tolist() == (inputs.astype(np.int32) @ weights.astype(np.int32)).tolist()


def test_probe_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SECONDS", 0.1)
    started = time.perf_counter()
    rates = peaks.measure_peaks("cpu", 2)
    assert time.perf_counter() - started < 20
    with peaks.BandwidthReader(2) as reader:
        reader.sample()
    # Between a slow board and the fastest server.
    assert rates.compute is not None
    assert 1e9 < reader.rates[0] < 5e12
    assert rates.bandwidth is None
    assert 1e9 < rates.compute < 1e14
    assert rates.not_measured == {}


# GPUs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Install a fake of ``cuda.bindings.runtime``."""
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setattr(peaks, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "SECONDS", 0.1)
    monkeypatch.setattr(peaks, "WARM_UP", 0.0)
    return fake


def test_copy_bandwidth_counts_reads_and_writes(cuda: FakeCuda) -> None:
    cuda.copy_rate = 5e7  # bytes a millisecond
    assert peaks.gpu_bandwidth() == pytest.approx(2 * 5e7 * 1e3)
    assert cuda.calls.count("cudaMemcpyAsync") == 1 + 7  # a warm-up, and enough for a precise median
    cuda.check_all_freed()


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaEventCreate", "cudaStreamCreate", "cudaEventElapsedTime"])
def test_failed_copy_leaves_nothing_allocated(cuda: FakeCuda, function: str) -> None:
    opened = Cuda(cuda)
    cuda.failures[function] = Error.cudaErrorMemoryAllocation
    with pytest.raises(DeviceError, match=f"CUDA's {function} failed"):
        peaks.copy_bandwidth(opened)
    cuda.failures.clear()
    cuda.check_all_freed()


def test_compute_is_not_measured_on_tensorrt(cuda: FakeCuda) -> None:
    reason = "The compute throughput is measured on device cuda only; tensorrt would need an engine."
    cuda.copy_rate = 1 << 20  # a copy takes a millisecond
    assert peaks.measure_peaks("tensorrt", 1) == Peaks(2000 * cuda.copy_rate, None, {"compute": reason})


def test_bandwidth_needs_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr(peaks, "gpu_compute", lambda device: 4e13)
    rates = peaks.measure_peaks("cuda", 1)
    assert (rates.bandwidth, rates.compute) == (None, 4e13)
    assert "cuda-bindings is not installed" in rates.not_measured["bandwidth"]


def test_half_gemm_runs_on_the_given_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a GPU."""
    import onnxruntime

    outputs: list[onnxruntime.OrtValue] = []
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def kept(*arguments: object) -> onnxruntime.OrtValue:
        outputs.append(allocate(*arguments))
        return outputs[-1]

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", kept)
    assert peaks.half_gemm("cpu", CPU_PROVIDER, 64)() > 0
    numbers: npt.NDArray[np.float32] = np.resize(np.random.default_rng(0).normal(size=65_521), (64, 64)).astype(
        np.float32
    )
    assert np.allclose(outputs[0].numpy(), numbers @ numbers, atol=0.2)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_there_is_no_fallback_to_the_cpu() -> None:
    with pytest.raises(DeviceError, match=r"could not start its CUDAExecutionProvider\.$|failed to run a GEMM on cuda"):
        peaks.gpu_compute("cuda")


def test_compute_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "half_gemm", lambda device, provider, side: lambda: 0.25)
    assert peaks.gpu_compute("cuda") == peaks.SIDE**3 / 0.25

    def out_of_memory(device: str, provider: str, side: int) -> Callable[[], float]:
        raise RuntimeError("Failed to allocate memory\nand a long trace")

    monkeypatch.setattr(peaks, "half_gemm", out_of_memory)
    with pytest.raises(DeviceError, match=r"failed to run a GEMM on cuda: Failed to allocate memory$"):
        peaks.gpu_compute("cuda")
