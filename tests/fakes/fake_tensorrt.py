"""A fake of the modules ``tensorrt`` and ``tensorrt_rtx``: an engine is the ONNX model, which ONNX Runtime runs.

It has the names that ``export/engines/builder.py`` uses. ``fake_tensorrt_runtime.py`` has those that
``runtime/backends/tensorrt/graph.py`` uses. The fake refuses what TensorRT refuses. ``test_fake_tensorrt.py`` compares
it with the signatures of the real modules, from which the enumerations are made.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt_names import enumerations
from fakes.fake_tensorrt_plugin import FakePlugins
from fakes.fake_tensorrt_runtime import MAGIC, ILogger, Runtime, Shape, is_dynamic
from onnx import ModelProto, helper
from support.uninterruptible_wait import UninterruptibleWait

RTX, FULL, JETPACK_6 = ("tensorrt_rtx", "1.7.1.116"), ("tensorrt", "10.16.0"), ("tensorrt", "10.3.0")
NO_KERNEL = "Attention operation was not supported by a dedicated kernel."


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError


class IHostMemory(bytes):
    """Serialized content, with the buffer interface."""


class FakeTensorRT(ModuleType):
    """The fake module. Its attributes inject failures."""

    ILogger = ILogger
    IProgressMonitor = IProgressMonitor

    def __init__(self, name: str, version: str, cuda: FakeCuda) -> None:
        super().__init__(name)
        self.__version__ = version
        self.cuda = cuda
        self.has_fused_attention = True
        self.parse_error: str | None = None
        self.build_error: str | None = None
        self.load_error: str | None = None
        self.context_error: str | None = None
        self.run_error: str | None = None
        self.refuses_capture = False
        self.forgets_caches = False
        """Whether runs drop the updates of the KV cache."""
        self.on_step: Callable[[], None] = lambda: None
        """Called at every step of a build."""
        self.built: list[IBuilderConfig] = []
        """Configurations of all built engines."""
        self.loaded = 0
        """Number of deserialized engines."""
        self.runs = 0
        self.kernels: SimpleNamespace | None = None
        """Content of TensorRT-RTX's kernel cache."""
        self.released_early: list[str] = []
        """Objects that were freed before their users, as sentences."""
        self.wait: UninterruptibleWait | None = None
        """Wait in which a build hangs; None for a build that completes."""
        self.Builder = partial(Builder, self)
        self.OnnxParser = partial(OnnxParser, self)
        self.Runtime = partial(Runtime, self)
        self.plugin = FakePlugins()
        for enumeration, members in enumerations(name, version).items():
            if not hasattr(type(self), enumeration):
                setattr(self, enumeration, members)


# Building --------------------------------------------------------------------------------------------------------


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError(f"{input}: {min}, {opt} and {max} are not in order.")
        self.shapes[input] = (tuple(min), tuple(opt), tuple(max))


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.content)


class IBuilderConfig:
    progress_monitor: IProgressMonitor | None = None
    num_compute_capabilities: int = 0

    def __init__(self) -> None:
        self.model = ModelProto()
        """The built model."""
        self.pools: dict[Enum, int] = {}
        self.capabilities: dict[int, Enum] = {}
        self.features: set[Enum] = set()
        self.flags_set: set[Enum] = set()
        self.profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: Enum, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def set_compute_capability(self, compute_capability: Enum, index: int) -> bool:
        assert 0 <= index < self.num_compute_capabilities
        self.capabilities[index] = compute_capability
        return True

    def set_preview_feature(self, feature: Enum, enable: bool) -> None:
        (self.features.add if enable else self.features.discard)(feature)

    def set_flag(self, flag: Enum) -> None:
        self.flags_set.add(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        is_damaged = serialized_timing_cache.startswith(b"damaged")
        return None if is_damaged else ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and cache.content.startswith(b"another GPU's"):
            return False
        self._cache = cache
        return True


class INetworkDefinition:
    def __init__(self) -> None:
        self.model, self.folder = ModelProto(), Path()


class OnnxParser:
    def __init__(self, module: FakeTensorRT, network: INetworkDefinition, logger: ILogger) -> None:
        self._module, self._network = module, network
        self._errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> str:
        return self._errors[index]

    def parse(self, model: bytes, path: str = "") -> bool:
        parsed, folder = ModelProto.FromString(model), Path(path).parent
        if self._module.parse_error is not None:
            self._errors.append(self._module.parse_error)
        functions = {function.name for function in parsed.functions}
        for node in (node for node in parsed.graph.node if node.domain and node.op_type not in functions):
            attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            plugin = f"{attributes.get('plugin_namespace', b'').decode()}::{node.op_type}"
            if not attributes.get("aot") or plugin not in self._module.plugin.registered:
                self._errors.append(f"There is no plugin for {node.op_type}.")
        for node in parsed.graph.node if self._module.__name__ == "tensorrt" else ():
            sizes = {helper.get_attribute_value(one) for one in node.attribute if one.name == "block_size"}
            if node.op_type == "DequantizeLinear" and sizes - {64, 128}:
                self._errors.append(f"{node.name} has blocks of {sizes}, not of 64 or 128.")
        for tensor in parsed.graph.initializer:
            data = {entry.key: entry.value for entry in tensor.external_data}
            if data and (folder / data["location"]).stat().st_size < int(data["offset"]) + int(data["length"]):
                self._errors.append(f"{tensor.name} is not in {data['location']}.")
        self._network.model, self._network.folder = parsed, folder
        return not self._errors


class Builder:
    def __init__(self, module: FakeTensorRT, logger: ILogger) -> None:
        self._module, self._logger = module, logger

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 1 << int(self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        module, error = self._module, self._module.build_error
        if not module.has_fused_attention and any(
            node.op_type == "Attention" and all(one.name != "TRT_decomposable" for one in node.attribute)
            for node in network.model.graph.node
        ):
            error = NO_KERNEL
        dynamic = {value.name for value in network.model.graph.input if is_dynamic(value)}
        if error is None and any(profile.shapes.keys() != dynamic for profile in config.profiles):
            error = "A profile misses an input."
        if error is not None:
            self._logger.log(ILogger.Severity.INTERNAL_ERROR, error)
            return None
        if not self._advance(config.progress_monitor):
            return None
        if (cache := config._cache) is not None:
            assert module.__name__ == "tensorrt"
            cache.content += f"{network.model.graph.name} ".encode()
        config.model = network.model
        module.built.append(config)
        profiles = [profile.shapes for profile in config.profiles]
        made_by, model = (module.__name__, module.__version__), network.model.SerializeToString()
        return IHostMemory(MAGIC + pickle.dumps((made_by, str(network.folder), model, profiles)))

    def _advance(self, monitor: IProgressMonitor | None) -> bool:
        """Report progress, and return whether the build continues."""
        if monitor is None:
            return True
        if self._module.wait is not None:
            return self._module.wait.until_refused(monitor)
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            self._module.on_step()
            if not monitor.step_complete("Building", step):
                return False
        monitor.phase_finish("Building")
        return True
