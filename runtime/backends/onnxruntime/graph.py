"""One graph on ONNX Runtime: its session, and its tensors on the right device."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.backends.onnxruntime.library import FATAL, release_numbers
from fusion_edge.runtime.bundle.graphs import GraphSpec, TensorSpec, graph_specs
from fusion_edge.runtime.bundle.manifest import MANIFEST, Manifest, data_file, graph_file
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.interruptible import run_interruptible
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory, usable_processors

PROVIDERS: Mapping[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # The default arena doubles with every extension, so weights could take twice their memory.
    # Other options keep their defaults. do_copy_in_default_stream: off, copies may race with the graph.
    # cudnn_conv_algo_search, use_tf32: no graph has a convolution, and none for CUDA a float32 MatMul.
    # enable_cuda_graph: refuses graphs with an If, and inputs on the host such as total_length.
    "cuda": ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),
}
TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
    "bool": "tensor(bool)",
}
"""ONNX Runtime's type names by numpy dtype name."""
SHORT_SPIN = 100
"""Microseconds until an idle thread sleeps."""
FIRST_WITH_DURATION = (1, 26)
"""Release of ONNX Runtime that can limit the time of spinning; in older ones it is all or nothing."""
DEVICES = {"Cpu": "cpu", "Cuda": "cuda"}
"""Device names by the name of ONNX Runtime's memory."""


class Tensor:
    """An output on the graph's device. ``numpy.asarray`` copies it to the host as float32."""

    def __init__(self, value: ort.OrtValue) -> None:
        self.value = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.value.numpy().astype(np.float32 if dtype is None else dtype, copy=bool(copy))  # type: ignore[no-any-return]


Input = npt.NDArray[Any] | Tensor


class Graph:
    """A loaded graph. Its inputs lie on the device that reads them, so no run copies them."""

    def __init__(self, bundle: Bundle, name: str, device: str, threads: int | None = None, spin: bool = False) -> None:
        """Load a graph. ``threads`` defaults to every processor that this process may use.

        Idle threads ``spin`` for tens of milliseconds, or sleep soon. On a CPU our own kernels replace ONNX Runtime's
        if they can run the graph (``cpu_kernels.py``). Raises :class:`DeviceError` if the device does not start,
        :class:`FusionError` if the graph does not load.
        """
        self.name = name
        self.device = device
        self._session = _session(bundle, name, device, threads or usable_processors(), spin)
        self.large_run, self.small_run = _run_options(device), _run_options()
        """Options of runs. Setting ``terminate`` ends a run at its next node."""
        spec = _spec(bundle.manifest, name)
        _check_tensors(self._session, spec, bundle.folder / MANIFEST)
        self.inputs: Mapping[str, TensorSpec] = {tensor.name: tensor for tensor in spec.inputs}
        self._outputs = {tensor.name: tensor for tensor in spec.outputs}
        memory = zip(self._session.get_inputs(), self._session.get_input_memory_infos(), strict=True)
        self._places = {tensor.name: DEVICES[info.name] for tensor, info in memory}

    def tensor(self, name: str, data: Input) -> ort.OrtValue:
        """Return ``data`` with an input's dtype on its device. On a CPU a matching array is not copied."""
        if isinstance(data, Tensor):
            return data.value
        array = np.asarray(data, self.inputs[name].dtype, order="C")
        return ort.OrtValue.ortvalue_from_numpy(array, self._places[name], 0)

    def write(self, name: str, tensor: ort.OrtValue, data: npt.ArrayLike) -> None:
        """Overwrite the tensor of an input, in its shape."""
        tensor.update_inplace(np.asarray(data, self.inputs[name].dtype, order="C").reshape(tensor.shape()))

    def binding(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        """Bind the inputs and outputs of a run. The tensors must outlive the binding."""
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor)
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, tensor)
        return binding

    def bind_in_place(
        self, binding: ort.IOBinding, source: str, result: str, memory: ort.OrtValue, shape: tuple[int, ...]
    ) -> None:
        """Bind an input and an output to the start of the same ``memory``."""
        tensor = (self._places[source], 0, np.dtype(self.inputs[source].dtype).type, shape, memory.data_ptr())
        binding.bind_input(source, *tensor)
        binding.bind_output(result, *tensor)

    def bind_input(self, binding: ort.IOBinding, name: str, pointer: int, shape: tuple[int, ...]) -> None:
        """Bind an input to memory of its device, which must outlive the binding."""
        binding.bind_input(name, self._places[name], 0, np.dtype(self.inputs[name].dtype).type, shape, pointer)

    def bind_output(self, binding: ort.IOBinding, name: str, pointer: int, shape: tuple[int, ...]) -> None:
        """Bind an output to memory of the graph's device, which must outlive the binding."""
        binding.bind_output(name, self.device, 0, np.dtype(self._outputs[name].dtype).type, shape, pointer)

    def run(self, inputs: Mapping[str, Input], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Run the graph and return its outputs by name, in new memory of the given ``shapes``."""
        with translate_errors(self.name, self.device):
            tensors = {name: self.tensor(name, data) for name, data in inputs.items()}
            outputs = {name: self._allocate(name, shape) for name, shape in shapes.items()}
            binding = self.binding(tensors, outputs)
        self.run_bound(binding)
        return {name: Tensor(value) for name, value in outputs.items()}

    def run_bound(self, binding: ort.IOBinding) -> None:
        """Run the graph, and free its scratch memory afterwards.

        In the main thread, an exception of a signal handler, such as Ctrl-C's, ends the run at its next node.
        """
        with translate_errors(self.name, self.device):
            run_interruptible(lambda: self._session.run_with_iobinding(binding, self.large_run), self.interrupt)

    def run_bound_step(self, binding: ort.IOBinding, can_interrupt: bool) -> None:
        """Run the graph of a short step, which :meth:`interrupt` ends only if it can.

        Run options cost 50 us in ONNX Runtime 1.31, a seventh of a small model's decode step.
        """
        with translate_errors(self.name, self.device):
            self._session.run_with_iobinding(binding, self.small_run if can_interrupt else None)

    def interrupt(self, terminate: bool = True) -> None:
        """End the current run at its next node and make later ones fail, or with False let them succeed again."""
        self.large_run.terminate = self.small_run.terminate = terminate

    def _allocate(self, name: str, shape: tuple[int, ...]) -> ort.OrtValue:
        dtype = np.dtype(self._outputs[name].dtype).type
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, 0)


def _spec(manifest: Manifest, name: str) -> GraphSpec:
    specs = graph_specs(manifest.model, manifest.target, manifest.activations, manifest.cache)
    return next(spec for spec in specs if spec.name == name)


def _check_tensors(session: ort.InferenceSession, spec: GraphSpec, manifest: Path) -> None:
    """Raise :class:`FusionError` unless inputs and outputs match the manifest."""
    for expected, found in ((spec.inputs, session.get_inputs()), (spec.outputs, session.get_outputs())):
        listed = {tensor.name: (TYPES[tensor.dtype], list(tensor.shape)) for tensor in expected}
        if listed != {tensor.name: (tensor.type, tensor.shape) for tensor in found}:
            raise FusionError(
                f"{manifest} and {graph_file(spec.name)} do not belong together: inputs or outputs differ; export the "
                "bundle again."
            )


@contextmanager
def translate_errors(graph: str, device: str) -> Iterator[None]:
    """Translate ONNX Runtime's errors and a lack of memory to :class:`FusionError`."""
    try:
        yield
    except FusionError:
        raise
    except Exception as error:  # many unrelated types
        if is_out_of_memory(error):
            problem = not_enough_memory(f"run {graph}", _requested(error), device == "cpu")
            raise FusionError(
                f"{problem}; ask with a smaller --query-len, close other programs, or export with fewer "
                "--image-tokens, a smaller --max-context or --kv-cache int8."
            ) from error
        raise FusionError(
            f"ONNX Runtime failed while running {graph}: {_reason(error)} Check the bundle with fusion-info."
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error's message as a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".: ") + "."


def _needed_bytes(bundle: Bundle) -> int:
    """Return the minimum bytes of a load: the files and the KV cache."""
    manifest = bundle.manifest
    return manifest.size + manifest.max_context * manifest.cache_token_bytes


def _requested(error: Exception) -> int | None:
    """Return the bytes that ONNX Runtime failed to allocate, if its message names them."""
    found = re.search(r"buffer of size (\d+)", str(error))
    return None if found is None else int(found[1])


def _session(bundle: Bundle, name: str, device: str, threads: int, spin: bool) -> ort.InferenceSession:
    path, _ = bundle.path(graph_file(name)), bundle.path(data_file(name))
    missing = _load_cuda_libraries() if device == "cuda" else []
    provider, settings = PROVIDERS[device]
    options = _session_options(bundle.manifest, threads, spin)
    try:
        if device == "cpu" and cpu_kernels.can_run(bundle.manifest, name):
            cpu_kernels.use_threads(threads)
            options.register_custom_ops_library(str(cpu_kernels.library()))
        session = ort.InferenceSession(str(path), options, providers=[(provider, settings)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises many unrelated types here
        if is_out_of_memory(error):
            problem = not_enough_memory(f"load {path}", _needed_bytes(bundle), device == "cpu")
            raise FusionError(
                f"{problem}; close other programs, use fewer --threads, or export a smaller bundle."
            ) from error
        remedy = "Upgrade onnxruntime"
        if bundle.manifest.cache == "int8" and not bundle.manifest.has_per_token_scales:
            remedy += ", or export with --kv-cache float: older releases do not support an int8 KV cache"
        raise FusionError(f"ONNX Runtime {ort.__version__} cannot load {path}: {_reason(error)} {remedy}.") from error
    if provider not in session.get_providers():
        remedy = "upgrade the GPU driver, or install the onnxruntime-gpu that fits it"
        if missing:
            remedy = f"{', '.join(missing)} cannot be loaded: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them"
        raise DeviceError(f"ONNX Runtime {ort.__version__} could not start its {provider}; {remedy}.")
    return session


def _load_cuda_libraries() -> list[str]:
    """Load CUDA and cuDNN from NVIDIA's wheels or from the system, and return the names of missing libraries.

    Only the provider knows whether it needs them.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # ONNX Runtime prints the failures
        ort.preload_dlls()
    return re.findall(r"^Failed to load ([^:\s]+)", printed.getvalue(), re.MULTILINE)


def _session_options(manifest: Manifest, threads: int, spin: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # ONNX Runtime's default counts physical cores, and finds one on virtual machines.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if not spin:
        # Each session has threads of its own. By default they spin for tens of milliseconds after a run, and take
        # processors from the next graph and from other programs. Within a run, operators follow sooner than SHORT_SPIN.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SHORT_SPIN))
        if release_numbers(ort.__version__) < FIRST_WITH_DURATION:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = FATAL
    if manifest.target == "tensorrt":
        # ONNX Runtime fuses INT4 MatMuls; they compute in float, as TensorRT does.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(manifest.accuracy_level))
    elif not has_vnni(Path("/proc/cpuinfo").read_text(encoding="utf-8")):
        # u8s8 GEMM (w8a8) overflows without VNNI; this selects u8u8, which takes twice as long.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def has_vnni(cpuinfo: str) -> bool:
    """Return whether the text of ``/proc/cpuinfo`` lists VNNI, with which u8s8 GEMM does not overflow."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return flags is not None and not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())


def _run_options(shrinking: str | None = None) -> ort.RunOptions:
    """Return run options. Those of a run on the CPU ``shrinking`` free scratch memory after the run.

    By default each of the three graphs keeps the scratch memory of its largest run. Measured for the LLM after a prompt
    of 900 tokens at 3B: 0.3 GB, freed at no cost in time. Freeing GPU memory would stall the device.
    """
    options = ort.RunOptions()
    options.log_severity_level = FATAL
    if shrinking == "cpu":
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options
