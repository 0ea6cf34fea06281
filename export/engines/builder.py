"""Building the engines of a bundle with TensorRT or TensorRT-RTX, one part of a graph at a time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import onnx
from onnx import ModelProto, ValueInfoProto

from fusion_edge.export.engines.decompositions import missing_operators, replace_operators
from fusion_edge.export.engines.optimization_profiles import Limits, Ranges, profiles, shapes
from fusion_edge.export.engines.partition import fix_dimension, split, tensor_dtype, tensor_shape
from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.onnx_functions.builder import qualify_names
from fusion_edge.kernels.triton.ahead_of_time import KERNELS
from fusion_edge.kernels.triton.kernel_folder import KernelFolder
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages
from fusion_edge.runtime.bundle.engine_manifest import Engine, EnginePlatform
from fusion_edge.runtime.bundle.files import FileEntry, digest
from fusion_edge.runtime.bundle.graphs import LLM
from fusion_edge.runtime.bundle.manifest import MANIFEST, graph_file
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.interruptible import interruptible
from fusion_edge.runtime.system.progress import Progress


@dataclass(frozen=True)
class BuildOptions:
    """What the user asks for; each field is an option of ``fusion-build`` and explained there."""

    workspace: int | None = None
    """Bytes of scratch memory that TensorRT may try kernels with; None: its default."""
    parts: int = 4
    """Engines that the LLM is cut into: with four, building takes less memory than the bundle has bytes."""
    kernels: Path | None = None
    """A folder of compiled kernels for the plugins; None: Triton compiles them."""
    verbose: bool = False


def why_no_plugins(library: Library, machine: EnginePlatform, options: BuildOptions) -> str | None:
    """Why the recursive alignment runs as standard operators, in one sentence; None if plugins compute it."""
    return tensorrt_plugins.unsupported_reason(library.module, machine.architecture, options.kernels is not None)


class EngineBuilder:
    """Builds the engines of one bundle for one machine into a folder."""

    def __init__(
        self,
        bundle: Bundle,
        library: Library,
        machine: EnginePlatform,
        built_for: Limits,
        options: BuildOptions,
        uses_plugins: bool,
    ) -> None:
        """``machine`` is the library and a compute capability; ``uses_plugins`` if :func:`why_no_plugins` has none."""
        self._bundle = bundle
        self._library = library
        self._machine = machine
        self._limits = built_for
        self._options = options
        self._messages = Messages(library, options.verbose)
        self._logger = self._messages.logger()
        self.timing_cache = b""
        """Of earlier builds, before; what is worth keeping for later ones, after. TensorRT-RTX has none."""
        self.missing_operators = [] if library.is_rtx else missing_operators(library.version_numbers)
        """Those that this TensorRT does not read, which functions of older ones replace."""
        self._uses_plugins = uses_plugins
        if self._uses_plugins:
            source = None if options.kernels is None else self._kernels(options.kernels)
            tensorrt_plugins.register(importlib.import_module(f"{library.name}.plugin"), machine.architecture, source)

    def _kernels(self, folder: Path) -> KernelFolder:
        """Raises :class:`FusionError` if one is missing: TensorRT, which asks for it later, could not tell."""
        kernels, width = KernelFolder(folder), self._bundle.manifest.model.language.hidden_size
        for name in KERNELS:
            kernels(name, self._machine.architecture, width, "fp16")
        return kernels

    def build(self, folder: Path) -> dict[str, tuple[Engine, ...]]:
        """Write every engine to ``folder``; by graph name, its parts in the order in which they run.

        Raises :class:`FusionError` with what TensorRT says if it cannot build one.
        """
        ranges = profiles(self._bundle.manifest, self._limits)
        return {name: tuple(self._engines(name, ranges[name], folder)) for name in self._bundle.manifest.graphs}

    def _engines(self, name: str, ranges: list[Ranges], folder: Path) -> Iterator[Engine]:
        model = onnx.load(self._bundle.path(graph_file(name)), load_external_data=False)
        fix_dimension(model, "capacity", self._limits.max_context)
        if self.missing_operators:
            language = self._bundle.manifest.model.language
            groups = language.heads // language.kv_heads if name == LLM else 1
            replace_operators(model, self.missing_operators, groups)
        for function in model.functions:
            qualify_names(function)  # older bundles have not
        parts = split(model, self._options.parts) if name == LLM else [model]
        for number, part in enumerate(parts, 1):
            label = name if len(parts) == 1 else f"{name} {number}/{len(parts)}"
            file = folder / f"{label.replace(' ', '-').replace('/', '-of-')}.engine"
            if self._uses_plugins:
                tensorrt_plugins.use_plugins(part)
            self._write(part, ranges, label, file)
            entry = FileEntry(file.name, file.stat().st_size, digest(file))
            yield Engine(entry, _tensors(part.graph.input), _tensors(part.graph.output), tuple(ranges))

    def _write(self, model: ModelProto, ranges: list[Ranges], label: str, file: Path) -> None:
        """Parse, build and write one engine. Raises :class:`FusionError`."""
        trt = self._library.module
        self._messages.errors.clear()
        with Progress(f"Building {label}", 0, unit=None) as progress:
            cancelled = Event()
            monitor = _monitor(trt, progress, cancelled)

            def build(decompose_attention: bool) -> Any:
                return interruptible(lambda: self._plan(model, ranges, monitor, decompose_attention), cancelled.set)

            # Fused attention first: what has no kernel for it is an error that says so, and comes early.
            plan = build(decompose_attention=False)
            if plan is None and any("dedicated kernel" in error for error in self._messages.errors):
                sys.stderr.write(
                    f"{label}: {self._library.name} has no fused attention for these heads; its parts run one by one.\n"
                )
                self._messages.errors.clear()
                plan = build(decompose_attention=True)
        if plan is None:
            raise FusionError(
                f"{self._library.name} {self._library.version} cannot build {label} for compute capability "
                f"{self._machine.compute_capability}: {self._messages.first_error()}. Where memory ran out, build with "
                "more --parts, a smaller --max-context or --workspace."
            )
        with file.open("wb") as output:
            output.write(memoryview(plan))

    def _plan(self, model: ModelProto, ranges: list[Ranges], monitor: Any, decompose_attention: bool) -> Any:
        """The serialized engine (``IHostMemory``), or None if TensorRT gave up."""
        trt = self._library.module
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        # In the folder of this path the parser finds the data file, which it maps into memory.
        if not parser.parse(model.SerializeToString(), str(self._bundle.folder / MANIFEST)):
            self._messages.errors.insert(0, str(parser.get_error(0)) if parser.num_errors else "")
            return None
        if decompose_attention:
            _decompose_attention(trt, network)
        config = self._config(builder, monitor)
        inputs = [(value.name, tensor_shape(value)) for value in model.graph.input]
        for dimensions in ranges:
            profile = builder.create_optimization_profile()
            for name, sizes in inputs:
                if any(isinstance(size, str) for size in sizes):
                    profile.set_shape(name, *shapes(sizes, dimensions))
            config.add_optimization_profile(profile)
        if self._library.is_rtx:  # times nothing while it builds
            return builder.build_serialized_network(network, config)
        cache = config.create_timing_cache(self.timing_cache)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # damaged, or another GPU's
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        self.timing_cache = bytes(memoryview(cache.serialize()))
        return plan

    def _config(self, builder: Any, monitor: Any) -> Any:
        trt, machine = self._library.module, self._machine
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        if self._options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._options.workspace)
        if self._library.is_rtx:
            config.num_compute_capabilities = 1
            config.set_compute_capability(_compute_capability(trt, machine.compute_capability), 0)
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # a run that allocates cannot be recorded
        if self._uses_plugins:
            tensorrt_plugins.enable_aliasing(trt, config)
        return config


def _tensors(values: Iterable[ValueInfoProto]) -> tuple[Mapping[str, Any], ...]:
    return tuple({"name": value.name, "dtype": tensor_dtype(value), "shape": tensor_shape(value)} for value in values)


def _decompose_attention(trt: Any, network: Any) -> None:
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # layers come as their base class
            layer.attention.decomposable = True


def _compute_capability(trt: Any, written: str) -> Any:
    name = f"SM{written.replace('.', '')}"
    known = [one for one in dir(trt.ComputeCapability) if one.startswith("SM")]
    if name not in known:
        listed = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in sorted(known, key=lambda one: int(one[2:])))
        raise FusionError(
            f"{trt.__name__} {trt.__version__} does not build for compute capability {written}; it does for {listed}."
        )
    return getattr(trt.ComputeCapability, name)


def _monitor(trt: Any, progress: Progress, cancelled: Event) -> Any:
    """TensorRT's own progress: steps of phases, which may have phases of their own. It may come from any thread."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.extend(num_steps)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            if cancelled.is_set():  # an exception here would abort the process
                return False
            progress.advance(1)
            return True

    return Monitor()
