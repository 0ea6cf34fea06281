"""What the short probes of a machine count, and that they compute what they say; those of GPUs on stand-ins."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from fakes.fake_cuda import Error, FakeCuda

from fusion_edge.benchmarks.latency import peaks
from fusion_edge.benchmarks.latency.result import Rates
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.errors import DeviceError

CPU_PROVIDER = "CPUExecutionProvider"


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes half a second, as the median of three runs says."""

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
    with peaks.MemoryReader(threads) as reader:
        read.clear()
        reader.read()
        assert reader.size == 12 << 20
    assert len(read) == threads
    assert sum(read) == (12 << 20) / 8  # ones by ones, of 4 bytes each


def test_looks_at_the_memory_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "READ_BYTES", 12 << 20)
    monkeypatch.setattr(peaks, "QUIET", 0)
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr(peaks, "timed", lambda read: (read(), 0.5)[1])
    with peaks.MemoryReader(2) as reader:
        for now, count in ((100.0, 1), (101.9, 1), (102.1, 2)):  # noqa: B007 (the clock reads it)
            reader.look()
            assert reader.rates == [peaks.READINGS * (12 << 20) / 0.5] * count


def test_the_faster_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each multiply-add once."""
    medians = iter([0.5, 0.25, 0.75])
    monkeypatch.setattr(peaks, "repeat", lambda measure, seconds: [next(medians)])
    monkeypatch.setattr(peaks, "OUTPUTS", 256)
    assert peaks.multiplications(1) == peaks.ROWS * peaks.INPUTS * 256 / 0.25


@pytest.mark.parametrize("own_kernels", [False, True])
def test_the_int4_product_is_that_of_the_weights(own_kernels: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (48, 2, 64), np.uint8)
    scales = rng.uniform(0.5, 2, (48, 2)).astype(np.float32)
    inputs = rng.normal(size=(5, 256)).astype(np.float32)
    library = cpu_kernels.library() if own_kernels and cpu_kernels.library() and cpu_kernels.is_supported() else None
    if own_kernels and library is None:
        pytest.skip("our CPU kernels: not built, or this processor has no AVX-512 VNNI")
    (outputs,) = peaks.int4_product(values, scales, 1, library).run(None, {"x": inputs})
    nibbles = np.stack([values & 15, values >> 4], axis=-1).reshape(48, 2, 128).astype(np.float32) - 8
    exact = inputs @ (nibbles * scales[..., None]).reshape(48, 256).T
    error = np.abs(outputs - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2  # inputs were rounded to 8 bits


def test_the_int8_product_is_exact() -> None:
    rng = np.random.default_rng(0)
    weights, inputs = rng.integers(-64, 64, (256, 48), np.int8), rng.integers(0, 128, (5, 256), np.uint8)
    (outputs,) = peaks.int8_product(weights, threads=1).run(None, {"x": inputs})
    assert outputs.tolist() == (inputs.astype(np.int32) @ weights.astype(np.int32)).tolist()


def test_a_short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SECONDS", 0.1)
    started = time.perf_counter()
    rates = peaks.probe("cpu", 2)
    assert time.perf_counter() - started < 20
    with peaks.MemoryReader(2) as reader:
        reader.look()
    # Between a slow board and the fastest server.
    assert rates.multiplications is not None
    assert 1e9 < reader.rates[0] < 5e12
    assert rates.bandwidth is None
    assert 1e9 < rates.multiplications < 1e14
    assert rates.not_measured == {}


# Of GPUs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """What ``cuda.bindings.runtime`` is."""
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setattr(peaks, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(peaks, "SECONDS", 0.1)
    monkeypatch.setattr(peaks, "WARM_UP", 0.0)
    return fake


def test_a_copy_reads_and_writes(cuda: FakeCuda) -> None:
    cuda.copy_rate = 5e7  # bytes a millisecond
    assert peaks.gpu_bandwidth() == pytest.approx(2 * 5e7 * 1e3)
    assert cuda.calls.count("cudaMemcpyAsync") == 1 + 7  # a warm-up, and as many as tell the median
    cuda.check_all_freed()


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaEventCreate", "cudaStreamCreate", "cudaEventElapsedTime"])
def test_a_copy_that_fails_leaves_nothing(cuda: FakeCuda, function: str) -> None:
    opened = Cuda(cuda)
    cuda.failures[function] = Error.cudaErrorMemoryAllocation
    with pytest.raises(DeviceError, match=f"CUDA's {function} failed"):
        peaks.copy_bandwidth(opened)
    cuda.failures.clear()
    cuda.check_all_freed()


def test_with_tensorrt_alone_products_are_not_measured(cuda: FakeCuda) -> None:
    reason = "The rate of products is measured with device cuda alone; tensorrt would need an engine."
    cuda.copy_rate = 1 << 20  # so that a copy takes a millisecond
    assert peaks.probe("tensorrt", 1) == Rates(2000 * cuda.copy_rate, None, {"multiplications": reason})


def test_without_bindings_the_bandwidth_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr(peaks, "gpu_multiplications", lambda device: 4e13)
    rates = peaks.probe("cuda", 1)
    assert (rates.bandwidth, rates.multiplications) == (None, 4e13)
    assert "cuda-bindings is not installed" in rates.not_measured["bandwidth"]


def test_the_half_product_is_computed_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the processor, as if it were a GPU."""
    import onnxruntime

    outputs: list[onnxruntime.OrtValue] = []
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def kept(*arguments: object) -> onnxruntime.OrtValue:
        outputs.append(allocate(*arguments))
        return outputs[-1]

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", kept)
    assert peaks.half_product("cpu", CPU_PROVIDER, 64)() > 0
    numbers: npt.NDArray[np.float32] = np.resize(np.random.default_rng(0).normal(size=65_521), (64, 64)).astype(
        np.float32
    )
    assert np.allclose(outputs[0].numpy(), numbers @ numbers, atol=0.2)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_no_processor_takes_the_gpus_place() -> None:
    with pytest.raises(DeviceError, match=r"could not start its CUDAExecutionProvider\.$|failed to multiply on cuda"):
        peaks.gpu_multiplications("cuda")


def test_the_rate_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "half_product", lambda device, provider, side: lambda: 0.25)
    assert peaks.gpu_multiplications("cuda") == peaks.SIDE**3 / 0.25

    def out_of_memory(device: str, provider: str, side: int) -> Callable[[], float]:
        raise RuntimeError("Failed to allocate memory\nand a long trace")

    monkeypatch.setattr(peaks, "half_product", out_of_memory)
    with pytest.raises(DeviceError, match=r"failed to multiply on cuda: Failed to allocate memory$"):
        peaks.gpu_multiplications("cuda")
