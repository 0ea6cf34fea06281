"""Probes that measure a device's rooflines in a few seconds: memory bandwidth and compute throughput.

The GPU probes have never run on a GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.latency.one_node_model import one_node_model
from fusion_edge.benchmarks.latency.result import Peaks
from fusion_edge.benchmarks.latency.statistics import repeat, timed
from fusion_edge.runtime.backends.cuda import Cuda, open_cuda
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.errors import DeviceError

SECONDS = 0.8  # upper limit of a probe
READ_BYTES = 256 << 20
"""Bytes that all threads read together: far more than the caches of a robot's or a desktop's processor."""
QUIET = 0.1  # seconds until the runtime's spinning threads go to sleep
SAMPLE_INTERVAL = 2.0  # seconds between two bandwidth samples while a case runs
READS_PER_SAMPLE = 8  # about as long as a decode step of a large model, so both average over the same time
ROW = 4096
"""Length of a dot product: too short for the BLAS library to start threads."""
ROWS, INPUTS, OUTPUTS = 256, 3072, 8192  # part of a prompt in the widest GEMM of a 3B model
BLOCK = 128

WARM_UP = 0.3  # seconds for an idle GPU to raise its clocks
COPY_BYTES = 256 << 20
SIDE = 8192
"""Side of the square matrices that a GPU multiplies: large enough to hide the launch overhead."""
CUDA_PROVIDER = "CUDAExecutionProvider"

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


def measure_peaks(device: str, threads: int) -> Peaks:
    """Measure the rooflines of a device; ``threads`` is the number of CPU threads.

    A GPU probe that cannot run gives None and the reason. The bandwidth of a CPU is not probed here but read between
    decode steps (:class:`BandwidthReader`).
    """
    if device == "cpu":
        return Peaks(None, cpu_compute(threads), {})
    peaks: dict[str, float] = {}
    not_measured: dict[str, str] = {}
    probes: Mapping[str, Callable[[], float]] = {
        "bandwidth": gpu_bandwidth,
        "compute": partial(gpu_compute, device),
    }
    for name, measure in probes.items():
        try:
            peaks[name] = measure()
        except DeviceError as error:
            not_measured[name] = str(error)
    return Peaks(peaks.get("bandwidth"), peaks.get("compute"), not_measured)


class BandwidthReader:
    """Reads ``size`` bytes with all threads, each byte once.

    Uses dot products of float32 vectors, numpy's fastest way to read: two streams of loads.
    """

    def __init__(self, threads: int) -> None:
        rows = max(READ_BYTES // (threads * 2 * ROW * 4), 1)
        self._pool = ThreadPoolExecutor(threads)
        self._parts = list(self._pool.map(lambda _: np.ones((2, rows, ROW), np.float32), range(threads)))
        self.size = sum(part.nbytes for part in self._parts)
        self.begin()
        self.read()  # the BLAS library allocates its memory at the first call

    def __enter__(self) -> BandwidthReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self._parts.clear()

    def begin(self) -> None:
        """Discard all samples."""
        self.rates: list[float] = []
        """Bytes per second of every :meth:`sample`."""
        self._last_sample = -math.inf

    def read(self) -> None:
        """Read everything once."""
        list(self._pool.map(_read, self._parts))

    def sample(self) -> None:
        """Measure the bandwidth once, unless the last sample is younger than :data:`SAMPLE_INTERVAL`.

        On a shared machine the bandwidth changes from minute to minute, so it is sampled between decode steps.
        """
        if time.perf_counter() - self._last_sample < SAMPLE_INTERVAL:
            return
        time.sleep(QUIET)
        self.read()
        self.rates.append(READS_PER_SAMPLE * self.size / timed(self._read_often))
        self._last_sample = time.perf_counter()

    def _read_often(self) -> None:
        for _ in range(READS_PER_SAMPLE):
            self.read()


def _read(part: Floats) -> Floats:
    """Multiply ``[2, N, ROW]`` pairwise to ``[N, 1, 1]`` without holding the GIL."""
    products: Floats = np.matmul(part[0, :, None, :], part[1, :, :, None])
    return products


def cpu_compute(threads: int) -> float:
    """Return the multiply-adds per second of the fastest GEMM on this CPU, INT4 or INT8.

    The bundle's precision does not matter: a faster GEMM that it does not use is still the roofline.
    """
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (OUTPUTS, INPUTS // BLOCK, BLOCK // 2), np.uint8)
    scales = np.full((OUTPUTS, INPUTS // BLOCK), 0.01, np.float32)
    weights = rng.integers(-127, 128, (INPUTS, OUTPUTS), np.int8)
    inputs = rng.integers(0, 256, (ROWS, INPUTS), np.uint8)
    gemms = [
        (int4_gemm(values, scales, threads), inputs.astype(np.float32)),
        (int8_gemm(weights, threads), inputs),
    ]
    if cpu_kernels.library() is not None and cpu_kernels.is_supported():
        gemms.append((int4_gemm(values, scales, threads, cpu_kernels.library()), inputs.astype(np.float32)))
    medians = [
        statistics.median(repeat(partial(timed, partial(session.run, None, {"x": x})), SECONDS)) for session, x in gemms
    ]
    return ROWS * INPUTS * OUTPUTS / min(medians)


def int4_gemm(values: npt.NDArray[np.uint8], scales: Floats, threads: int, library: Path | None = None) -> Any:
    """Return a session of MatMulNBits at accuracy level 4: ``x`` ``[M, K]`` float32 with INT4 weights.

    ``values`` ``[N, K / block, block / 2]``, ``scales`` ``[N, K / block]``; ``library``: custom operators to use.
    """
    outputs, blocks, half = values.shape
    size = {"K": blocks * half * 2, "N": outputs, "bits": 4, "block_size": 2 * half}
    attributes = {"accuracy_level": 4, **size}
    weights: dict[str, npt.NDArray[Any]] = {"w": values, "s": scales}
    inputs = {"x": np.float32}
    return _session(
        "MatMulNBits", inputs, np.float32, weights, "com.microsoft", attributes, threads=threads, library=library
    )


def int8_gemm(weights: npt.NDArray[np.int8], threads: int) -> Any:
    """Return a session of MatMulInteger: ``x`` ``[M, K]`` uint8 with weights ``[K, N]``."""
    return _session("MatMulInteger", {"x": np.uint8}, np.int32, {"w": weights}, threads=threads)


def gpu_bandwidth() -> float:
    """Return the bytes per second that a copy within GPU memory reads and writes, timed with CUDA events.

    Raises :class:`DeviceError` if CUDA's bindings are missing or memory runs out.
    """
    return copy_bandwidth(open_cuda())


def copy_bandwidth(cuda: Cuda) -> float:
    """Measure :func:`gpu_bandwidth`."""
    with ExitStack() as stack:

        def kept(thing: T, release: Callable[[T], None]) -> T:
            stack.callback(release, thing)
            return thing

        source, target = (kept(cuda.allocate(COPY_BYTES), cuda.free) for _ in range(2))
        start, end = (kept(cuda.event(), cuda.destroy_event) for _ in range(2))
        stream = kept(cuda.stream(), cuda.destroy_stream)

        def copy() -> float:
            cuda.record(start, stream)
            cuda.copy(target, source, COPY_BYTES, stream)
            cuda.record(end, stream)
            cuda.wait(stream)
            return cuda.seconds_between(start, end)

        return 2 * COPY_BYTES / statistics.median(repeat(copy, SECONDS, WARM_UP))


def gpu_compute(device: str) -> float:
    """Return the multiply-adds per second of a float16 GEMM in ONNX Runtime.

    Raises :class:`DeviceError` for devices without ONNX Runtime, and if ONNX Runtime fails.
    """
    if device != "cuda":
        raise DeviceError(f"The compute throughput is measured on device cuda only; {device} would need an engine.")
    try:
        return SIDE**3 / statistics.median(repeat(half_gemm(device, CUDA_PROVIDER, SIDE), SECONDS, WARM_UP))
    except DeviceError:
        raise
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DeviceError(f"ONNX Runtime failed to run a GEMM on {device}: {reason}") from None


def half_gemm(device: str, provider: str, side: int) -> Callable[[], float]:
    """Return a function that multiplies two ``[side, side]`` float16 matrices on a device and returns the seconds.

    Raises :class:`DeviceError` if the provider does not start; there is no fallback.
    """
    import onnxruntime

    session = _session("MatMul", {"x": np.float16, "w": np.float16}, np.float16, {}, provider=provider)
    if provider not in session.get_providers():
        raise DeviceError(f"ONNX Runtime {onnxruntime.__version__} could not start its {provider}.")
    numbers = np.resize(np.random.default_rng(0).normal(size=65_521), (side, side)).astype(np.float16)
    binding = session.io_binding()
    for name in ("x", "w"):
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(numbers, device, 0))
    output = onnxruntime.OrtValue.ortvalue_from_shape_and_type((side, side), np.float16, device, 0)
    binding.bind_ortvalue_output("y", output)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return partial(timed, run)


def _session(
    operator: str,
    inputs: Mapping[str, type[np.generic]],
    output: type[np.generic],
    weights: Mapping[str, npt.NDArray[Any]],
    domain: str = "",
    attributes: Mapping[str, int] | None = None,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    library: Path | None = None,
) -> Any:
    """Return a session of one operator on matrices: ``inputs``, then ``weights``, to ``y``."""
    import onnxruntime

    model = one_node_model(operator, inputs, output, weights, domain, attributes)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session_options.log_severity_level = 3
    if library is not None:
        session_options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, session_options, providers=[provider], enable_fallback=0)
