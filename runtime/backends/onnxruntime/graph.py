"""One graph of a bundle on ONNX Runtime: its session, and tensors where it reads them."""

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
from fusion_edge.runtime.backends.onnxruntime.library import FATAL
from fusion_edge.runtime.bundle.graphs import GraphSpec, TensorSpec, graph_specs
from fusion_edge.runtime.bundle.manifest import MANIFEST, Manifest, data_file, graph_file
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory, usable_processors

PROVIDERS: Mapping[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # The arena would double with every extension; a graph's weights would take up to twice their room.
    # All else stays as it is, with reason. do_copy_in_default_stream: off, copies may race with the graph.
    # cudnn_conv_algo_search, use_tf32: no graph has a convolution, none for this device a product in float32.
    # enable_cuda_graph: refuses graphs with an If, and inputs on the host (total_length is one).
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
"""ONNX Runtime's names of types by numpy's."""
DEVICES = {"Cpu": "cpu", "Cuda": "cuda"}
"""Names of devices by those of ONNX Runtime's memory."""


class Tensor:
    """A graph's output, on the graph's device. ``numpy.asarray`` brings it to the host as float32."""

    def __init__(self, value: ort.OrtValue) -> None:
        self.value = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.value.numpy().astype(np.float32 if dtype is None else dtype, copy=bool(copy))  # type: ignore[no-any-return]


Input = npt.NDArray[Any] | Tensor


class Graph:
    """A loaded graph. Its inputs are tensors in the memory that it reads them from, so that no run copies them."""

    def __init__(self, bundle: Bundle, name: str, device: str, threads: int | None = None) -> None:
        """``threads`` of None takes every processor that this process may use. On a CPU our own kernels take the place
        of ONNX Runtime's where they can run the graph (``cpu_kernels.py``).

        Raises :class:`DeviceError` if the device does not start, :class:`FusionError` if the graph does not load.
        """
        self.name = name
        self.device = device
        self._session = _session(bundle, name, device, threads or usable_processors())
        self.large_run = _options_of_a_large_run(device)
        """Options of large runs: setting their ``terminate`` ends one at its next node."""
        spec = _spec(bundle.manifest, name)
        _check_tensors(self._session, spec, bundle.folder / MANIFEST)
        self.inputs: Mapping[str, TensorSpec] = {tensor.name: tensor for tensor in spec.inputs}
        self._outputs = {tensor.name: tensor for tensor in spec.outputs}
        memory = zip(self._session.get_inputs(), self._session.get_input_memory_infos(), strict=True)
        self._places = {tensor.name: DEVICES[info.name] for tensor, info in memory}

    def tensor(self, name: str, data: Input) -> ort.OrtValue:
        """An input, of the input's type and where the graph reads it. A host's array is not copied on a host."""
        if isinstance(data, Tensor):
            return data.value
        array = np.asarray(data, self.inputs[name].dtype, order="C")
        return ort.OrtValue.ortvalue_from_numpy(array, self._places[name], 0)

    def write(self, name: str, tensor: ort.OrtValue, data: npt.ArrayLike) -> None:
        """Overwrite an input's tensor, of the same shape, wherever it lies."""
        tensor.update_inplace(np.asarray(data, self.inputs[name].dtype, order="C").reshape(tensor.shape()))

    def binding(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        """What a run reads and writes. The tensors must live as long as it is used."""
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor)
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, tensor)
        return binding

    def bind_in_place(
        self, binding: ort.IOBinding, source: str, result: str, memory: ort.OrtValue, shape: tuple[int, ...]
    ) -> None:
        """Have a run read an input from the start of ``memory`` and write an output to the same place."""
        tensor = (self._places[source], 0, np.dtype(self.inputs[source].dtype).type, shape, memory.data_ptr())
        binding.bind_input(source, *tensor)
        binding.bind_output(result, *tensor)

    def run(self, inputs: Mapping[str, Input], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Outputs by name, in memory of their own. ``shapes`` are theirs."""
        with translate_errors(self.name, self.device):
            tensors = {name: self.tensor(name, data) for name, data in inputs.items()}
            outputs = {name: self._allocate(name, shape) for name, shape in shapes.items()}
            binding = self.binding(tensors, outputs)
        self.run_bound(binding, large=True)
        return {name: Tensor(value) for name, value in outputs.items()}

    def run_bound(self, binding: ort.IOBinding, large: bool) -> None:
        """Run; after a ``large`` run memory that it alone needed is given back.

        Other runs go without options, which cost ONNX Runtime 40 us (1.31): a tenth of a small model's step.
        """
        with translate_errors(self.name, self.device):
            self._session.run_with_iobinding(binding, self.large_run if large else None)

    def _allocate(self, name: str, shape: tuple[int, ...]) -> ort.OrtValue:
        dtype = np.dtype(self._outputs[name].dtype).type
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, 0)


def _spec(manifest: Manifest, name: str) -> GraphSpec:
    specs = graph_specs(manifest.model, manifest.target, manifest.activations, manifest.cache)
    return next(spec for spec in specs if spec.name == name)


def _check_tensors(session: ort.InferenceSession, spec: GraphSpec, manifest: Path) -> None:
    """Raise :class:`FusionError` unless a graph takes and gives what the manifest says."""
    for expected, found in ((spec.inputs, session.get_inputs()), (spec.outputs, session.get_outputs())):
        told = {tensor.name: (TYPES[tensor.dtype], list(tensor.shape)) for tensor in expected}
        if told != {tensor.name: (tensor.type, tensor.shape) for tensor in found}:
            raise FusionError(
                f"{manifest} and {graph_file(spec.name)} do not belong together: its inputs or outputs are others; "
                "export the bundle again."
            )


@contextmanager
def translate_errors(graph: str, device: str) -> Iterator[None]:
    """ONNX Runtime's own errors, and memory that runs out, as one of ours."""
    try:
        yield
    except FusionError:
        raise
    except Exception as error:  # a dozen unrelated types
        if is_out_of_memory(error):
            told = not_enough_memory(f"run {graph}", _requested(error), device == "cpu")
            raise FusionError(
                f"{told}; ask with a smaller --query-len, close other programs, or export with fewer --image-tokens, a "
                "smaller --max-context or --kv-cache int8."
            ) from error
        raise FusionError(
            f"ONNX Runtime failed while running {graph}: {_reason(error)} Check the bundle with fusion-info."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, as a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".: ") + "."


def _needed_bytes(bundle: Bundle) -> int:
    """What a load takes at the least: the files, and the whole KV cache."""
    manifest = bundle.manifest
    cache = manifest.model.language.cache_values * manifest.max_context * np.dtype(manifest.cache).itemsize
    return manifest.size + cache


def _requested(error: Exception) -> int | None:
    """Bytes that ONNX Runtime asked for in vain, if it tells."""
    found = re.search(r"buffer of size (\d+)", str(error))
    return None if found is None else int(found[1])


def _session(bundle: Bundle, name: str, device: str, threads: int) -> ort.InferenceSession:
    path, _ = bundle.path(graph_file(name)), bundle.path(data_file(name))
    missing = _load_cuda_libraries() if device == "cuda" else []
    provider, settings = PROVIDERS[device]
    options = _session_options(bundle.manifest, threads)
    try:
        if device == "cpu" and cpu_kernels.can_run(bundle.manifest, name):
            options.register_custom_ops_library(str(cpu_kernels.library()))
        session = ort.InferenceSession(str(path), options, providers=[(provider, settings)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        if is_out_of_memory(error):
            told = not_enough_memory(f"load {path}", _needed_bytes(bundle), device == "cpu")
            raise FusionError(
                f"{told}; close other programs, take fewer --threads, or export a smaller bundle."
            ) from error
        remedy = "Upgrade onnxruntime"
        if bundle.manifest.cache == "int8":
            remedy += ", or export with --kv-cache float: older releases know no int8 KV cache"
        raise FusionError(f"ONNX Runtime {ort.__version__} cannot load {path}: {_reason(error)} {remedy}.") from error
    if provider not in session.get_providers():
        remedy = "upgrade the GPU's driver, or install the onnxruntime-gpu that was built for it"
        if missing:
            remedy = f"{', '.join(missing)} cannot be loaded: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them"
        raise DeviceError(f"ONNX Runtime {ort.__version__} could not start its {provider}; {remedy}.")
    return session


def _load_cuda_libraries() -> list[str]:
    """Load CUDA and cuDNN from NVIDIA's wheels, where they are installed, or else from the system.

    Names of those that are in neither; whether they are needed the provider knows.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # which is how ONNX Runtime tells
        ort.preload_dlls()
    return re.findall(r"^Failed to load ([^:\s]+)", printed.getvalue(), re.MULTILINE)


def _session_options(manifest: Manifest, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # ONNX Runtime's own default counts what it takes for physical cores and finds one on virtual machines.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    if manifest.target == "tensorrt":
        # Its products with INT4 weights are fused; they shall compute in float, as TensorRT does.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(manifest.accuracy_level))
    elif not has_vnni(Path("/proc/cpuinfo").read_text(encoding="utf-8")):
        # Products of unsigned and signed bytes (w8a8) overflow; this makes both unsigned, which takes twice as long.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def has_vnni(cpuinfo: str) -> bool:
    """Whether a processor multiplies bytes without overflow, by what ``/proc/cpuinfo`` says of it."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return flags is not None and not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())


def _options_of_a_large_run(device: str) -> ort.RunOptions:
    """Memory that a large run alone needed is given back to the system afterwards.

    ONNX Runtime would keep it for the next run; three graphs would hold the room of their largest runs at once
    (measured: 0.3 GB of the LLM's after a prompt of 900 at 3B, at no cost in time). Freeing a GPU's would stall it.
    """
    options = ort.RunOptions()
    options.log_severity_level = FATAL
    if device == "cpu":
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options
