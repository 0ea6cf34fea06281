"""The kernels of the recursive alignment against numpy: through CUDA's driver, or else in the PTX interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.benchmarks.acceptance.comparison import largest_error
from fusion_edge.benchmarks.acceptance.device import (
    DriverKernel,
    downloaded,
    find_cuda,
    seconds_of,
    uploaded,
)
from fusion_edge.benchmarks.acceptance.steps import Outcome, SkippedStep, Workspace
from fusion_edge.benchmarks.latency.peaks import copy_bandwidth
from fusion_edge.kernels.onnx_functions import alignment as references
from fusion_edge.kernels.ptx.machine import run
from fusion_edge.kernels.tensorrt_plugins import PLUGINS, Plugin
from fusion_edge.kernels.triton.ahead_of_time import ARCHITECTURES, CONTEXT_ROWS, compile_kernel
from fusion_edge.kernels.triton.kernel_folder import CompiledKernel, KernelFolder, KernelSource
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.memory import DeviceMemory
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, ALIGNMENT_NORM_EPS

WIDTH = 3072
"""Hidden size of the 3B model."""
INTERPRETED_ARCHITECTURE = "87"
INTERPRETED, LAUNCHED = ((0, 3), (1, 1), (2, 3)), ((0, 144), (1, 1), (2, 144))
"""Questions and latents a question."""
TIMED = 1, 144
TIMED_BYTES = 256 << 20  # of all sets of inputs: more than any L2 cache

Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class AlignmentCase:
    """Inputs of one operator, and its output in float64."""

    inputs: Arrays
    expected: npt.NDArray[np.float64]


def alignment_case(kernel: str, questions: int, latents: int, width: int, seed: int = 0) -> AlignmentCase:
    """Return random inputs ``[questions,latents,width]`` in float16 for one of the kernels, with the result."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> npt.NDArray[np.float16]:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    rows, context = (questions, latents, width), (1, latents, CONTEXT_ROWS, width)
    if kernel == "context_attention":
        q, k, v = normal(*rows), normal(*context), normal(*context)
        result = references.context_attention_reference(_wide(q), _wide(k), _wide(v), ALIGNMENT_HEADS)
        return AlignmentCase([q, k, v], result)
    if kernel == "add_layer_norm":
        x, residual, weight, bias = normal(*rows), normal(*rows), normal(width), normal(width)
        wide = _wide(x), _wide(residual), _wide(weight), _wide(bias)
        result = references.add_layer_norm_reference(*wide, ALIGNMENT_NORM_EPS)
        return AlignmentCase([x, residual, weight, bias], result)
    length = 2 * questions * latents + 1
    positions = rng.permutation(length)[: questions * latents].reshape(questions, latents)
    x, old, update = normal(1, length, width), normal(*rows), normal(*rows)
    result = references.add_rows_reference(_wide(x), positions, _wide(old), _wide(update))
    return AlignmentCase([x, positions, old, update], result)


def _wide(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return array.astype(np.float64)


def check(workspace: Workspace, name: str) -> Outcome:
    """Compare a kernel with numpy, with 0, 1 and many rows; on a GPU also measure its bandwidth.

    Without CUDA the kernel is interpreted, and the summary says why.
    """
    plugin = next(plugin for plugin in PLUGINS if plugin.kernel == name)
    found = find_cuda()
    cuda = found if isinstance(found, Cuda) else None
    architecture = INTERPRETED_ARCHITECTURE if cuda is None else cuda.compute_capability().replace(".", "")
    kernel = kernel_source(workspace, architecture)(name, architecture, WIDTH, "fp16")
    errors = {}
    for questions, latents in INTERPRETED if cuda is None else LAUNCHED:
        case = alignment_case(name, questions, latents, WIDTH)
        output = interpreted(plugin, kernel, case) if cuda is None else launched(cuda, plugin, kernel, case)
        label = f"{questions * latents} rows"
        errors[label] = largest_error(f"{name} of {label}", output, case.expected)
    figures: dict[str, Any] = {"architecture": architecture, "interpreted": cuda is None, "largest_errors": errors}
    summary = f"sm_{architecture}, largest error {max(errors.values()):.1e}"
    if cuda is None:
        return Outcome(f"{summary}, interpreted. {found}", figures)
    figures |= bandwidth(cuda, plugin, kernel)
    share = figures["bandwidth"] / figures["copy_bandwidth"]
    return Outcome(f"{summary}, {figures['bandwidth'] / 1e9:.0f} GB/s, {share:.0%} of a copy's", figures)


def kernel_source(workspace: Workspace, architecture: str) -> KernelSource:
    """Return the compiled kernels of ``--kernels``, or those that Triton compiles. Raises :class:`SkippedStep`."""
    if architecture not in ARCHITECTURES:
        raise SkippedStep(f"There are no kernels for sm_{architecture}, only for {', '.join(ARCHITECTURES)}.")
    if workspace.kernels is not None:
        return KernelFolder(workspace.kernels)
    if missing := [name for name in ("torch", "triton") if find_spec(name) is None]:
        raise SkippedStep(f"{' and '.join(missing)} not installed; compile the kernels elsewhere and pass --kernels.")
    return compile_kernel


def interpreted(plugin: Plugin, kernel: CompiledKernel, case: AlignmentCase) -> npt.NDArray[Any]:
    """Run a kernel in the PTX interpreter and return its output."""
    inputs = [array.copy() for array in case.inputs]
    output: npt.NDArray[Any] = inputs[0] if plugin.in_place else np.full_like(inputs[0], np.nan)
    grid, integers = plugin.launch(*(array.shape for array in inputs))
    arguments = [*inputs, *integers, output]
    run(kernel.ptx, grid=grid, block=kernel.threads, arguments=arguments, shared_bytes=kernel.shared_bytes)
    return output


def launched(cuda: Cuda, plugin: Plugin, kernel: CompiledKernel, case: AlignmentCase) -> npt.NDArray[Any]:
    """Run a kernel on the GPU and return its output."""
    memory, stream = DeviceMemory(cuda), cuda.stream()
    pointers = _pointers(memory, plugin, case, stream)
    function = DriverKernel(kernel)
    _enqueue(function, plugin, case, pointers, stream)
    output: npt.NDArray[Any] = downloaded(memory, pointers[-1], case.inputs[0], stream).copy()
    function.close()
    memory.close()
    cuda.destroy_stream(stream)
    return output


def _pointers(memory: DeviceMemory, plugin: Plugin, case: AlignmentCase, stream: int) -> list[int]:
    """Return pointers to copies of the inputs, and to the output."""
    pointers = [uploaded(memory, array, stream) for array in case.inputs]
    output = pointers[0] if plugin.in_place else uploaded(memory, np.full_like(case.inputs[0], np.nan), stream)
    return [*pointers, output]


def _enqueue(function: DriverKernel, plugin: Plugin, case: AlignmentCase, pointers: Sequence[int], stream: int) -> None:
    grid, integers = plugin.launch(*(array.shape for array in case.inputs))
    function.launch(grid, pointers[:-1], integers, pointers[-1], stream)


def bandwidth(cuda: Cuda, plugin: Plugin, kernel: CompiledKernel) -> dict[str, float]:
    """Return seconds and bytes per second of a kernel over inputs that no cache holds, and a copy's rate."""
    case = alignment_case(plugin.kernel, *TIMED, WIDTH)
    moved = bytes_moved(plugin, case)
    memory, stream, function = DeviceMemory(cuda), cuda.stream(), DriverKernel(kernel)
    sets = [_pointers(memory, plugin, case, stream) for _ in range(-(-TIMED_BYTES // moved))]

    def launch_all() -> None:
        for pointers in sets:
            _enqueue(function, plugin, case, pointers, stream)

    seconds = seconds_of(cuda, stream, launch_all) / len(sets)
    function.close()
    memory.close()
    cuda.destroy_stream(stream)
    return {"seconds": seconds, "bandwidth": moved / seconds, "copy_bandwidth": copy_bandwidth(cuda)}


def bytes_moved(plugin: Plugin, case: AlignmentCase) -> int:
    """Return the bytes that a kernel reads and writes: an operator in place reads no row of its first input."""
    read = sum(array.nbytes for array in (case.inputs[1:] if plugin.in_place else case.inputs))
    return read + (case.inputs[-1] if plugin.in_place else case.inputs[0]).nbytes
