"""Compare the CPU kernels with ONNX Runtime's own, at the sizes of real models.

    python -m fusion_edge.benchmarks.cpu_kernels

Figures are the median CPU time of one thread over rounds in which both take turns. Other load on the machine affects
them through shared caches and memory only.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import FunctionProto, TensorProto, helper, numpy_helper

from fusion_edge.kernels.onnx_functions.linear import (
    integer_matmul_function,
    integer_mlp_function,
    matmul_nbits_function,
)
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError

FLOAT, INT8, INT32 = int(TensorProto.FLOAT), int(TensorProto.INT8), int(TensorProto.INT32)
PROMPT, CAPACITY = 900, 1000  # tokens of a prompt, and of its KV cache
VISION_CROPS, VISION_ROWS, VISION_HEADS, VISION_WIDTH = 4, 729, 16, 72
INTEGER_LAYERS = ((1152, 3456), (1152, 1152), (1152, 4304, 1152))  # widths of linear layers, and of an MLP
OPSET = 21
LINEAR_LAYERS = (  # format, outputs, inputs: three of the LLM, one of the vision encoder
    (WeightFormat("int4", 128), 8192, 3072),
    (WeightFormat("int4", 128), 3072, 8192),
    (WeightFormat("int4", 32), 8192, 3072),
    (WeightFormat("int8", 128), 4304, 1152),
)
LLMS = {"Phi-3.5": (32, 32, 96), "Llama": (32, 8, 128)}  # query heads, KV heads, head width
ROUNDS = 7
DECODE_LAYERS = 16  # layers in turns, whose weights or caches exceed the processor's caches
Run = Callable[[], object]


def session(
    operator: str,
    inputs: dict[str, int],
    outputs: dict[str, int],
    attributes: dict[str, Any],
    library: Path | None,
    weights: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
    function: FunctionProto | None = None,
) -> onnxruntime.InferenceSession:
    """Return a session of one node.

    ``inputs`` and ``outputs`` are element types by name. An input whose name starts with ``-`` is missing. ``weights``
    follow the inputs. ``function`` defines the operator, unless it is Microsoft's.
    """
    names = ["" if name.startswith("-") else name for name in inputs]
    domain = "com.microsoft" if function is None else function.domain
    node = helper.make_node(operator, [*names, *weights], list(outputs), domain=domain, **attributes)
    given = [helper.make_tensor_value_info(name, inputs[name], None) for name in names if name]
    made = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()]
    functions = [] if function is None else [function]
    opsets = [helper.make_opsetid(name, version) for name, version in (("", OPSET), (domain, 1))]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], operator, given, made, tensors)
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bound(model: onnxruntime.InferenceSession, feeds: dict[str, onnxruntime.OrtValue], rows: tuple[int, ...]) -> Run:
    """Return a run with preallocated outputs. Caches are extended in place: present shares the memory of past."""
    binding = model.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    outputs = []
    for output in model.get_outputs():
        past = feeds.get(output.name.replace("present", "past"))
        outputs.append(past or onnxruntime.OrtValue.ortvalue_from_shape_and_type(rows, np.float32))
        binding.bind_ortvalue_output(output.name, outputs[-1])
    memory = feeds, outputs  # the binding holds pointers only
    return lambda: (model.run_with_iobinding(binding), memory)


def values(feeds: dict[str, object]) -> dict[str, onnxruntime.OrtValue]:
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(value)) for name, value in feeds.items()}


def linear(weight_format: WeightFormat, outputs: int, inputs: int, rows: int, layers: int, library: Path | None) -> Run:
    """Return a run of ``layers`` linear layers with 4 or 8-bit weights, all with the same input."""
    random = np.random.default_rng(0)
    shape = weight_format.packed_shape(outputs, inputs)
    sizes = {
        "K": inputs,
        "N": outputs,
        "bits": weight_format.bits,
        "block_size": weight_format.block_size,
        "accuracy_level": 4,
    }
    x = random.normal(size=(rows, inputs)).astype(np.float32)
    runs = []
    for _ in range(layers):
        weights: dict[str, npt.NDArray[Any]] = {
            "values": np.frombuffer(random.bytes(math.prod(shape)), np.uint8).reshape(shape),
            "scales": np.full(shape[:2], 0.01, np.float16),
        }
        function = matmul_nbits_function(OPSET)
        model = session(function.name, {"x": FLOAT}, {"y": FLOAT}, sizes, library, weights, function)
        runs.append(bound(model, values({"x": x}), (rows, outputs)))
    return lambda: [run() for run in runs]


def integer_layer(widths: tuple[int, ...], library: Path | None) -> Run:
    """Return a run of a linear layer or an MLP of the vision encoder with 8-bit weights and calibrated activations."""
    random = np.random.default_rng(0)
    made = integer_matmul_function if len(widths) == 2 else integer_mlp_function
    function = made(OPSET)
    weights: dict[str, npt.NDArray[Any]] = {}
    for inputs, outputs in pairwise(widths):
        tensors: tuple[npt.NDArray[Any], ...] = (
            random.integers(-127, 128, (outputs, inputs), np.int8),
            np.full(outputs, 0.001, np.float16),
            np.array(0.03, np.float32),
            np.array(128, np.uint8),
            np.zeros(outputs, np.float32),
        )
        weights |= zip(function.input[1 + len(weights) :], tensors, strict=False)
    model = session(function.name, {"x": FLOAT}, {"y": FLOAT}, {}, library, weights, function)
    x = random.normal(size=(VISION_CROPS * VISION_ROWS, widths[0])).astype(np.float32)
    return bound(model, values({"x": x}), (len(x), widths[-1]))


def vision_attention(library: Path | None) -> Run:
    """Return a run of the vision encoder's attention."""
    inputs = {"q": FLOAT, "k": FLOAT, "v": FLOAT, "-bias": FLOAT, "mask": INT32}
    attributes: dict[str, Any] = {"num_heads": VISION_HEADS, "mask_filter_value": -1e9}
    model = session("MultiHeadAttention", inputs, {"attended": FLOAT}, attributes, library)
    random = np.random.default_rng(0)
    shape = (1, VISION_ROWS, VISION_HEADS * VISION_WIDTH)
    feeds: dict[str, object] = {name: random.normal(size=shape).astype(np.float32) for name in "qkv"}
    feeds["mask"] = np.ones((1, VISION_ROWS), np.int32)
    return bound(model, values(feeds), shape)


def causal_attention(llm: str, length: int, int8: bool, layers: int, library: Path | None) -> Run:
    """Return a run of ``layers`` attention layers of an LLM: a prefill, or a decode step if ``length`` is 1."""
    heads, kv_heads, width = LLMS[llm]
    cache = INT8 if int8 else FLOAT
    inputs = {"qkv": FLOAT, "-key": FLOAT, "-value": FLOAT, "past_key": cache, "past_value": cache}
    inputs |= {"last_position": INT32, "total_length": INT32, "cos": FLOAT, "sin": FLOAT}
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}
    if int8:
        inputs |= {"-positions": INT32, "-bias": FLOAT, "-sinks": FLOAT, "key_scale": FLOAT, "value_scale": FLOAT}
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    outputs = {"attended": FLOAT, "present_key": cache, "present_value": cache}
    model = session("GroupQueryAttention", inputs, outputs, attributes, library)
    random = np.random.default_rng(0)
    total = length if length > 1 else PROMPT
    angles = np.arange(CAPACITY)[:, None] * 1e4 ** -np.linspace(0, 1, width // 2)
    feeds: dict[str, object] = {
        "qkv": random.normal(size=(1, length, (heads + 2 * kv_heads) * width)).astype(np.float32),
        "last_position": np.array([total - 1], np.int32),
        "total_length": np.array(total, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    if int8:
        feeds |= {f"{part}_scale": np.full((1, kv_heads, 1, width), 0.02, np.float32) for part in ("key", "value")}
    runs = []
    for _ in range(layers):
        caches: dict[str, object] = {
            f"past_{part}": random.integers(-100, 100, (1, kv_heads, CAPACITY, width), np.int8)
            if int8
            else random.random((1, kv_heads, CAPACITY, width), np.float32)
            for part in ("key", "value")
        }
        runs.append(bound(model, values(feeds | caches), (1, length, heads * width)))
    return lambda: [run() for run in runs]


def seconds(runs: list[Run]) -> list[float]:
    """Return the median CPU time of each run, in seconds, over rounds in which they take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, own in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            own.append(time.process_time() - start)
    return [median(own) for own in times]


def report(name: str, make: Callable[[Path | None], Run], library: Path, layers: int, work: float, unit: str) -> None:
    """Print a row for each tier. ``work`` of one layer is in 10^9 operations or bytes, as ``unit`` says."""
    ours, names = make(library), cpu_kernels.tiers()

    def run(tier: str) -> None:
        cpu_kernels.use_tier(tier)
        ours()

    theirs, *times = (each / layers for each in seconds([make(None), *(partial(run, tier) for tier in names)]))
    for tier, own in zip(names, times, strict=True):
        rate = f"{work / own:6.1f} {unit}"
        sys.stdout.write(f"{name:48} {theirs * 1e3:9.2f} ms {own * 1e3:9.2f} ms {theirs / own:6.2f} x {rate}, {tier}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, PROMPT], help="rows of linear layers; default: %(default)s"
    )
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    library = cpu_kernels.library()
    if library is None or not cpu_kernels.is_supported():
        raise FusionError("The CPU kernels are not built, or this processor lacks AVX-512 VNNI; see fusion-info.")
    sys.stdout.write(f"{'one layer':48} {'ONNX Runtime':>12} {'ours':>12} {'':8} one core\n")
    for weight_format, outputs, inputs in LINEAR_LAYERS:
        for rows in options.rows:
            work = rows * outputs * inputs * 2 / 1e9 if rows > 1 else outputs * inputs * weight_format.bits / 8 / 1e9
            layers = DECODE_LAYERS if rows == 1 else 1
            name = f"linear, {weight_format}, {inputs} to {outputs}, {rows} {'rows' if rows > 1 else 'row'}"
            make_linear = partial(linear, weight_format, outputs, inputs, rows, layers)
            report(name, make_linear, library, layers, work, "GOP/s" if rows > 1 else "GB/s")
    for widths in INTEGER_LAYERS:
        rows = VISION_CROPS * VISION_ROWS
        name = f"{'linear' if len(widths) == 2 else 'MLP'}, w8a8, {' to '.join(map(str, widths))}, {rows} rows"
        work = 2 * rows * sum(inputs * outputs for inputs, outputs in pairwise(widths)) / 1e9
        report(name, partial(integer_layer, widths), library, 1, work, "GOP/s")
    work = 4 * VISION_ROWS**2 * VISION_HEADS * VISION_WIDTH / 1e9
    report("attention, vision", vision_attention, library, 1, work, "GFLOP/s")
    for llm, (heads, kv_heads, width) in LLMS.items():
        work = 2 * PROMPT**2 * heads * width / 1e9
        report(
            f"attention, {llm}, prefill", partial(causal_attention, llm, PROMPT, False, 1), library, 1, work, "GFLOP/s"
        )
        for int8 in (False, True):
            work = 2 * PROMPT * kv_heads * width * (1 if int8 else 4) / 1e9
            make = partial(causal_attention, llm, 1, int8, DECODE_LAYERS)
            name = f"attention, {llm}, decode, {'int8' if int8 else 'float32'}"
            report(name, make, library, DECODE_LAYERS, work, "GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
