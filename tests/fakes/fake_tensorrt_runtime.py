"""The part of the fake TensorRT (``fake_tensorrt.py``) that runs engines, on ONNX Runtime."""

from __future__ import annotations

import math
import mmap
import pickle
import weakref
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from fakes.fake_cuda import Misuse
from onnx import ModelProto, helper
from support import tensorrt_parser

from fusion_edge.kernels.onnx_functions.masked_attention import MASKED_ATTENTION
from fusion_edge.kernels.operators import DOMAIN

if TYPE_CHECKING:
    from fakes.fake_tensorrt import FakeTensorRT

ADDRESS_ALIGNMENT = 256
"""Bytes of which the address of a tensor is a multiple."""
MAGIC = b"fake engine\n"
SCRATCH_BYTES = 4096
Shape = tuple[int, ...]


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


def is_dynamic(value: onnx.ValueInfoProto) -> bool:
    return any(dimension.dim_param for dimension in value.type.tensor_type.shape.dim)


def must_outlive(module: FakeTensorRT, factory: object, product: object) -> None:
    """Record in ``released_early`` if ``factory`` is freed before ``product``."""
    names, left = f"{type(factory).__name__} before {type(product).__name__}", weakref.ref(product)

    def note() -> None:
        if left() is not None:
            module.released_early.append(names)

    weakref.finalize(factory, note)


class Runtime:
    def __init__(self, module: FakeTensorRT, logger: ILogger) -> None:
        self._module, self._logger = module, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes | mmap.mmap) -> ICudaEngine | None:
        module = self._module
        module.loaded += 1
        content = bytes(serialized_engine)
        if not content.startswith(MAGIC):
            raise Misuse("TensorRT is given content that is not an engine.")
        made_by, folder, model, profiles = pickle.loads(content[len(MAGIC) :])
        if made_by != (module.__name__, module.__version__):
            raise Misuse(f"TensorRT is given an engine of {made_by}.")
        if module.load_error is not None:
            self._logger.log(ILogger.Severity.ERROR, module.load_error)
            return None
        return ICudaEngine(module, self._logger, ModelProto.FromString(model), Path(folder), profiles)


class ICudaEngine:
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(
        self,
        module: FakeTensorRT,
        logger: ILogger,
        model: ModelProto,
        folder: Path,
        profiles: list[dict[str, tuple[Shape, Shape, Shape]]],
    ) -> None:
        self.module, self.logger, self.profiles = module, logger, profiles
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        scatters = [node for node in model.graph.node if node.op_type in ("TensorScatter", "PlainTensorScatter")]
        self.in_place = {node.output[0]: node.input[0] for node in scatters}
        version = tuple(map(int, module.__version__.split(".")[:2]))
        has_scopes = module.__name__ == "tensorrt_rtx" or version >= tensorrt_parser.FIRST_CORRECT
        self.session = _session(model, folder, has_scopes)

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        names: list[str] = [*self.inputs, *self.outputs]
        return names[index]

    def create_runtime_config(self) -> IRuntimeConfig:
        assert self.module.__name__ == "tensorrt_rtx"
        config = IRuntimeConfig(self.module)
        must_outlive(self.module, self, config)
        return config

    def create_execution_context(self, runtime_config: Enum | IRuntimeConfig, /) -> IExecutionContext | None:
        strategy: Enum | IRuntimeConfig | None = runtime_config
        is_eager = False
        if isinstance(runtime_config, IRuntimeConfig):
            strategy, cache = runtime_config._strategy, runtime_config._cache()
            assert cache is not None
            self.module.kernels = cache._kernels
            how = runtime_config.dynamic_shapes_kernel_specialization_strategy
            is_eager = how == self.module.DynamicShapesKernelSpecializationStrategy.EAGER
        assert strategy == self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.module.context_error is not None:
            self.logger.log(ILogger.Severity.ERROR, self.module.context_error)
            return None
        context = IExecutionContext(self, is_eager or self.module.__name__ == "tensorrt")
        if isinstance(runtime_config, IRuntimeConfig):
            context._config = weakref.ref(runtime_config)
            for needed in (runtime_config, cache):
                must_outlive(self.module, needed, context)
        return context


class IRuntimeCache:
    """A cache of compiled kernels."""

    def __init__(self) -> None:
        self._kernels = SimpleNamespace(content=b"kernels", was_given=b"")

    def deserialize(self, blob: bytes) -> bool:
        self._kernels.was_given = bytes(blob)
        if not blob.startswith(b"kernels"):
            return False
        self._kernels.content = bytes(blob)
        return True

    def serialize(self) -> bytes:
        content: bytes = self._kernels.content
        return content


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Enum | None = None

    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        self._strategy: Enum | None = None
        self._cache: Callable[[], IRuntimeCache | None] = lambda: None

    def set_execution_context_allocation_strategy(self, strategy: Enum) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        cache = IRuntimeCache()
        must_outlive(self._module, self, cache)
        return cache

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = weakref.ref(cache)
        return True


def _session(model: ModelProto, folder: Path, has_scopes: bool) -> ort.InferenceSession:
    """Return the session that computes an engine. Plugin nodes are functions again, from the bundle's graph.

    Attributes that only TensorRT knows are removed.

    ``has_scopes``: whether the parser separates a function's parameters from tensors of the graph.
    """
    whole = onnx.load(folder / f"{model.graph.name.split('.')[0]}.onnx", load_external_data=False)
    has_masked_attention = any(function.name == MASKED_ATTENTION for function in whole.functions)
    for node in model.graph.node:
        if has_masked_attention and node.op_type == "Attention" and not node.domain:
            node.op_type, node.domain = MASKED_ATTENTION, DOMAIN  # ONNX Runtime's operator needs a query
        kept = [one for one in node.attribute if one.name not in ("plugin_namespace", "aot", "TRT_decomposable")]
        del node.attribute[:]
        node.attribute.extend(kept)
    kept_functions = {function.name for function in model.functions}
    model.functions.extend(function for function in whole.functions if function.name not in kept_functions)
    model = model if has_scopes else tensorrt_parser.inlined(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # keeps the weights of the graph
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, has_best_kernels: bool) -> None:
        self._engine, self._cuda = engine, engine.module.cuda
        self._has_best_kernels = has_best_kernels
        """Whether the first run of a shape compiles the best kernels."""
        self._profile: int | None = None
        self._scratch: tuple[int, int] | None = None
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {
            name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
            for name, value in engine.inputs.items()
            if not is_dynamic(value)
        }
        self._ran_with: dict[str, Shape] | None = None
        self._config: Callable[[], IRuntimeConfig | None] | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._cuda.view(memory, size)
        self._scratch = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert profile_index < len(self._engine.profiles)
        self._profile = profile_index
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory % ADDRESS_ALIGNMENT:
            raise Misuse(f"{name} lies at {memory:#x}, no multiple of {ADDRESS_ALIGNMENT}.")
        if name not in (*self._engine.inputs, *self._engine.outputs):
            return self._error(f"There is no tensor {name}.")
        self._addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        assert self._profile is not None
        least, _, largest = self._engine.profiles[self._profile][name]
        if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, largest, strict=True)):
            return self._error(f"{name} of {shape} is not from {least} to {largest}.")
        self._shapes[name] = tuple(shape)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, module = self._engine, self._engine.module
        if self._config is not None and self._config() is None:
            raise Misuse("A context runs whose configuration has been released.")
        missing = ({*engine.inputs, *engine.outputs} - self._addresses.keys()) | (engine.inputs.keys() - self._shapes)
        if missing or self._scratch is None:
            return self._error(f"No address, shape or scratch memory: {sorted(missing)}.")
        if module.run_error is not None:
            return self._error(module.run_error)
        if self._cuda.is_capturing(stream_handle):
            if module.refuses_capture or self._ran_with != self._shapes:
                self._cuda.streams[stream_handle].is_invalid = True
                return self._error("This cannot be captured.")
            if not self._has_best_kernels:
                raise Misuse("Provisional kernels are captured.")
        self._ran_with = dict(self._shapes)
        work = partial(self._compute, dict(self._addresses), dict(self._shapes))
        self._cuda.enqueue(stream_handle, work)
        return True

    def _error(self, message: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, message)
        return False

    def _check_overlaps(self, ranges: dict[str, tuple[int, int]], addresses: dict[str, int]) -> None:
        """Raise :class:`Misuse` unless exactly a KV cache that is updated shares memory of an input and an output."""
        in_place = self._engine.in_place
        for name in in_place.keys() & self._engine.outputs.keys():
            if addresses[name] != addresses[in_place[name]]:
                raise Misuse(f"{name} does not share the memory of {in_place[name]}.")
        for name in self._engine.outputs:
            start, size = ranges[name]
            for other, (at, bytes_there) in ranges.items():
                is_allowed = other == name or other == in_place.get(name)
                if size and bytes_there and at < start + size and start < at + bytes_there and not is_allowed:
                    raise Misuse(f"{name} shares its memory with {other}.")

    def _compute(self, addresses: dict[str, int], shapes: dict[str, Shape]) -> None:
        engine = self._engine
        assert self._scratch is not None
        self._cuda.view(*self._scratch)[...] = 0xEE  # overwrites other data that is stored there
        inputs = {name: self._array(addresses[name], engine.inputs[name], shapes[name]) for name in engine.inputs}
        results: Any = engine.session.run([*engine.outputs], inputs)
        arrays = inputs | dict(zip(engine.outputs, results, strict=True))
        self._check_overlaps({name: (addresses[name], array.nbytes) for name, array in arrays.items()}, addresses)
        for name, result in zip(engine.outputs, results, strict=True):
            if name not in engine.in_place or not engine.module.forgets_caches:
                self._array(addresses[name], engine.outputs[name], result.shape)[...] = result
        engine.module.runs += 1

    def _array(self, address: int, value: onnx.ValueInfoProto, shape: Shape) -> npt.NDArray[Any]:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        return self._cuda.view(address, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
