"""What this machine's CPU reaches at the most, measured in three seconds."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.latency.result import Rates
from fusion_edge.benchmarks.latency.statistics import repeat

SECONDS = 0.8  # of each probe, at the most
READ_BYTES = 512 << 20
"""By all threads together: far more than the caches of a robot's or a desktop's processor."""
ROW = 4096
"""Numbers of a dot product: so few that the BLAS library starts no threads of its own."""

ROWS, INPUTS, OUTPUTS = 128, 3072, 8192  # a piece of a prompt in the widest product of a 3B model
BLOCK = 128

Floats = npt.NDArray[np.float32]


def probe(threads: int) -> Rates:
    """Rates of so many threads, medians of repeated runs. Takes 0.5 GB of memory for a moment."""
    return Rates(bandwidth(threads), multiplications(threads))


def bandwidth(threads: int) -> float:
    """Bytes a second that all threads together read, each its own part of memory, each byte once.

    Dot products of float32 vectors: of all that numpy computes it reads fastest, with two streams of loads.
    """
    rows = READ_BYTES // (threads * 2 * ROW * 4)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda _: np.ones((2, rows, ROW), np.float32), range(threads)))
        seconds = repeat(lambda: list(pool.map(_read, parts)), SECONDS)
    return sum(part.nbytes for part in parts) / statistics.median(seconds)


def _read(part: Floats) -> Floats:
    """``[2, N, ROW]`` -> ``[N, 1, 1]``. Does not hold Python's lock."""
    products: Floats = np.matmul(part[0, :, None, :], part[1, :, :, None])
    return products


def multiplications(threads: int) -> float:
    """Multiply-adds a second, each counted once, of a prompt's product with INT4 weights as ONNX Runtime computes it.

    Weights in blocks of :data:`BLOCK`, inputs rounded to int8 (MatMulNBits, accuracy level 4).
    """
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (OUTPUTS, INPUTS // BLOCK, BLOCK // 2), np.uint8)
    scales = np.full((OUTPUTS, INPUTS // BLOCK), 0.01, np.float32)
    inputs = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    session = product(values, scales, threads)
    seconds = repeat(lambda: session.run(None, {"x": inputs}), SECONDS)
    return ROWS * INPUTS * OUTPUTS / statistics.median(seconds)


def product(values: npt.NDArray[np.uint8], scales: Floats, threads: int) -> Any:
    """Session that multiplies ``x`` ``[M, K]`` float32 with INT4 weights.

    ``values`` ``[N, K / block, block / 2]``, ``scales`` ``[N, K / block]``.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    outputs, blocks, half = values.shape
    size = {"K": blocks * half * 2, "N": outputs, "bits": 4, "block_size": 2 * half}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", accuracy_level=4, **size)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", size["K"]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(values, "w"), numpy_helper.from_array(scales, "s")],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
