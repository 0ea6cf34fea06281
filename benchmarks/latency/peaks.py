"""What a device reaches at the most: bandwidth of its memory and rate of products, measured in a few seconds.

The probes of GPUs have never run on one.
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

from fusion_edge.benchmarks.latency.result import Rates
from fusion_edge.benchmarks.latency.statistics import repeat, timed
from fusion_edge.runtime.backends.cuda import Cuda, open_cuda
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.errors import DeviceError

SECONDS = 0.8  # of each probe, at the most
READ_BYTES = 256 << 20
"""By all threads together: far more than the caches of a robot's or a desktop's processor."""
QUIET = 0.1  # seconds after which threads of the runtime, which wait for work, leave the cores to others
APART = 2.0  # seconds between two looks at the memory while a case is measured
READINGS = 8  # of a look: as long together as a step of a large model, which the memory's moments average in, too
ROW = 4096
"""Numbers of a dot product: so few that the BLAS library starts no threads of its own."""
ROWS, INPUTS, OUTPUTS = 256, 3072, 8192  # a piece of a prompt in the widest product of a 3B model
BLOCK = 128

WARM_UP = 0.3  # seconds in which an idle GPU's clocks rise
COPY_BYTES = 256 << 20
SIDE = 8192
"""Of the square matrices that a GPU multiplies: starting a product takes no part in its time."""
CUDA_PROVIDER = "CUDAExecutionProvider"

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


def probe(device: str, threads: int) -> Rates:
    """Of a device of :data:`fusion_edge.runtime.backends.devices.NAMES`; of a CPU with so many threads.

    A probe of a GPU that cannot be had gives None and the reason. The bandwidth of a CPU is read elsewhere, beside the
    steps (:class:`MemoryReader`).
    """
    if device == "cpu":
        return Rates(None, multiplications(threads), {})
    rates: dict[str, float] = {}
    not_measured: dict[str, str] = {}
    probes: Mapping[str, Callable[[], float]] = {
        "bandwidth": gpu_bandwidth,
        "multiplications": partial(gpu_multiplications, device),
    }
    for name, measure in probes.items():
        try:
            rates[name] = measure()
        except DeviceError as error:
            not_measured[name] = str(error)
    return Rates(rates.get("bandwidth"), rates.get("multiplications"), not_measured)


class MemoryReader:
    """Reads ``size`` bytes with all threads, each its own part, each byte once.

    Dot products of float32 vectors: of all that numpy computes it reads fastest, with two streams of loads.
    """

    def __init__(self, threads: int) -> None:
        rows = max(READ_BYTES // (threads * 2 * ROW * 4), 1)
        self._pool = ThreadPoolExecutor(threads)
        self._parts = list(self._pool.map(lambda _: np.ones((2, rows, ROW), np.float32), range(threads)))
        self.size = sum(part.nbytes for part in self._parts)
        self.begin()
        self.read()  # numpy's library takes memory of its own

    def __enter__(self) -> MemoryReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self._parts.clear()

    def begin(self) -> None:
        """Forget what was seen."""
        self.rates: list[float] = []
        """Bytes a second of every :meth:`look`."""
        self._last_look = -math.inf

    def read(self) -> None:
        """All of it."""
        list(self._pool.map(_read, self._parts))

    def look(self) -> None:
        """Time a reading between other work, if the last is not a moment ago.

        A machine that others share has a slow and a fast minute: a rate measured later says nothing about a step.
        """
        if time.perf_counter() - self._last_look < APART:
            return
        time.sleep(QUIET)
        self.read()
        self.rates.append(READINGS * self.size / timed(self._read_often))
        self._last_look = time.perf_counter()

    def _read_often(self) -> None:
        for _ in range(READINGS):
            self.read()


def _read(part: Floats) -> Floats:
    """``[2, N, ROW]`` -> ``[N, 1, 1]``. Does not hold Python's lock."""
    products: Floats = np.matmul(part[0, :, None, :], part[1, :, :, None])
    return products


def multiplications(threads: int) -> float:
    """Multiply-adds a second, each counted once, of the fastest product of a prompt that ONNX Runtime has on this CPU.

    Whatever the precision of the bundle: a product that it does not use is a limit, too.
    """
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (OUTPUTS, INPUTS // BLOCK, BLOCK // 2), np.uint8)
    scales = np.full((OUTPUTS, INPUTS // BLOCK), 0.01, np.float32)
    weights = rng.integers(-127, 128, (INPUTS, OUTPUTS), np.int8)
    inputs = rng.integers(0, 256, (ROWS, INPUTS), np.uint8)
    products = [
        (int4_product(values, scales, threads), inputs.astype(np.float32)),
        (int8_product(weights, threads), inputs),
    ]
    if cpu_kernels.library() is not None and cpu_kernels.is_supported():
        products.append((int4_product(values, scales, threads, cpu_kernels.library()), inputs.astype(np.float32)))
    medians = [
        statistics.median(repeat(partial(timed, partial(session.run, None, {"x": x})), SECONDS))
        for session, x in products
    ]
    return ROWS * INPUTS * OUTPUTS / min(medians)


def int4_product(values: npt.NDArray[np.uint8], scales: Floats, threads: int, library: Path | None = None) -> Any:
    """Session that multiplies ``x`` ``[M, K]`` float32, rounded to int8, with INT4 weights (MatMulNBits, level 4).

    ``values`` ``[N, K / block, block / 2]``, ``scales`` ``[N, K / block]``; ``library``: of kernels to take.
    """
    outputs, blocks, half = values.shape
    size = {"K": blocks * half * 2, "N": outputs, "bits": 4, "block_size": 2 * half}
    options = {"domain": "com.microsoft", "accuracy_level": 4, **size}
    weights: dict[str, npt.NDArray[Any]] = {"w": values, "s": scales}
    return _session("MatMulNBits", {"x": np.float32}, np.float32, weights, options, threads=threads, library=library)


def int8_product(weights: npt.NDArray[np.int8], threads: int) -> Any:
    """Session that multiplies ``x`` ``[M, K]`` uint8 with weights ``[K, N]`` (MatMulInteger)."""
    return _session("MatMulInteger", {"x": np.uint8}, np.int32, {"w": weights}, threads=threads)


def gpu_bandwidth() -> float:
    """Bytes a second that a copy within the GPU's memory reads and writes, timed by the GPU itself.

    Raises :class:`DeviceError` if CUDA's bindings or the memory are missing.
    """
    return copy_bandwidth(open_cuda())


def copy_bandwidth(cuda: Cuda) -> float:
    """See :func:`gpu_bandwidth`."""
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


def gpu_multiplications(device: str) -> float:
    """Multiply-adds a second, each counted once, of float16 matrices by ONNX Runtime.

    Raises :class:`DeviceError` where another library runs the bundle, and if ONNX Runtime fails.
    """
    if device != "cuda":
        raise DeviceError(f"The rate of products is measured with device cuda alone; {device} would need an engine.")
    try:
        return SIDE**3 / statistics.median(repeat(half_product(device, CUDA_PROVIDER, SIDE), SECONDS, WARM_UP))
    except DeviceError:
        raise
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DeviceError(f"ONNX Runtime failed to multiply on {device}: {reason}") from None


def half_product(device: str, provider: str, side: int) -> Callable[[], float]:
    """What multiplies two ``[side, side]`` float16 matrices on a device, and gives the seconds.

    Raises :class:`DeviceError` if the provider does not start: no other takes its place.
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
    options: Mapping[str, Any] | None = None,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
    library: Path | None = None,
) -> Any:
    """Session of one operator on matrices: ``inputs`` and then ``weights`` to ``y``."""
    import onnxruntime
    from onnx import helper, numpy_helper

    def matrix(name: str, dtype: type[np.generic]) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None, None])

    graph = helper.make_graph(
        [helper.make_node(operator, [*inputs, *weights], ["y"], **(options or {}))],
        "product",
        [matrix(name, dtype) for name, dtype in inputs.items()],
        [matrix("y", output)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session_options.log_severity_level = 3
    if library is not None:
        session_options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, session_options, providers=[provider], enable_fallback=0)
