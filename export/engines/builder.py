"""Build the engines of a bundle with TensorRT or TensorRT-RTX, one partition of a graph at a time."""

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

from fusion_edge.export.engines.decompositions import (
    allow_decomposition,
    decompose_operators,
    unsupported_operators,
    use_attention,
)
from fusion_edge.export.engines.float16 import has_int8, without_int8
from fusion_edge.export.engines.graph_values import fix_dimension, tensor_dtype, tensor_shape
from fusion_edge.export.engines.jetsons import out_of_memory_remedy
from fusion_edge.export.engines.linear_pieces import Pieces, cut_linears
from fusion_edge.export.engines.nvfp4 import use_fp4
from fusion_edge.export.engines.optimization_profiles import (
    DimensionRanges,
    EngineLimits,
    optimization_profiles,
    profile_shapes,
)
from fusion_edge.export.engines.partition import largest_block, partition_graph
from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.triton.ahead_of_time import KERNELS
from fusion_edge.kernels.triton.kernel_folder import KernelFolder
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages
from fusion_edge.runtime.bundle.engine_manifest import Engine, EnginePlatform
from fusion_edge.runtime.bundle.files import FileEntry, digest
from fusion_edge.runtime.bundle.graphs import LLM, VISION_ENCODER
from fusion_edge.runtime.bundle.manifest import MANIFEST, graph_file
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.interruptible import interruptible
from fusion_edge.runtime.system.jetson import this_jetson
from fusion_edge.runtime.system.output_file import write_whole
from fusion_edge.runtime.system.progress import Progress


@dataclass(frozen=True)
class BuildOptions:
    """Options of ``fusion-build`` that affect how engines are built."""

    workspace: int | None = None
    """Bytes of scratch memory for kernels. None: TensorRT's default."""
    parts: int = 4
    """Number of partitions of the LLM. With four, a build needs less memory than the size of the bundle."""
    max_block: int | None = None
    """Most bytes of a block for weights: of an engine, or of one weight in float16. None: no limit."""
    kernels: Path | None = None
    """Folder of compiled kernels for the plugins. None: Triton compiles them."""
    checks_memory: bool = True
    """Whether a small Jetson must have a free block for the weights of every engine."""
    compares: bool = True
    """Whether the engines are compared with the CPU, if this machine can."""
    reference: Path | None = None
    """File with the CPU's outputs. None: this machine's CPU computes them."""
    verbose: bool = False
    """Whether TensorRT prints all its messages."""


def plugins_unsupported_reason(library: Library, platform: EnginePlatform, options: BuildOptions) -> str | None:
    """Return why plugins cannot compute the recursive alignment, in one sentence. None if they can."""
    return tensorrt_plugins.unsupported_reason(library.module, platform.architecture, options.kernels is not None)


class EngineBuilder:
    """Builds the engines of one bundle for one platform into a folder."""

    def __init__(
        self,
        bundle: Bundle,
        library: Library,
        platform: EnginePlatform,
        limits: EngineLimits,
        options: BuildOptions,
        uses_plugins: bool,
    ) -> None:
        """Prepare a build, and register the plugins if they are used.

        Args:
            bundle: Bundle exported for TensorRT.
            library: TensorRT or TensorRT-RTX.
            platform: Library, version and compute capability to build for.
            limits: Largest inputs.
            options: Build options.
            uses_plugins: Whether plugins compute the recursive alignment. Requires that
                :func:`plugins_unsupported_reason` returns None.
        """
        self._bundle = bundle
        self._library = library
        self._platform = platform
        self._limits = limits
        self._options = options
        self._messages = Messages(library, options.verbose)
        self._logger = self._messages.logger()
        self._timing = b""
        """Timing cache of all builds so far. TensorRT-RTX has none."""
        self.decomposed = [] if library.is_rtx else unsupported_operators(library.version_numbers)
        """Operators that this TensorRT does not support; they are decomposed."""
        self._uses_plugins = uses_plugins
        if self._uses_plugins:
            source = None if options.kernels is None else self._kernels(options.kernels)
            tensorrt_plugins.register(importlib.import_module(f"{library.name}.plugin"), platform.architecture, source)

    def _kernels(self, folder: Path) -> KernelFolder:
        """Return the compiled kernels. Raises :class:`FusionError` if one is missing, which TensorRT would not name."""
        kernels, width = KernelFolder(folder), self._bundle.manifest.model.language.hidden_size
        for name in KERNELS:
            kernels(name, self._platform.architecture, width, "fp16")
        return kernels

    def build(self, folder: Path, timing_cache: Path | None = None) -> dict[str, tuple[Engine, ...]]:
        """Build all engines into ``folder``. Return them by graph name, partitions in running order.

        The file ``timing_cache`` is read, and replaced after each engine, so that no later failure loses its times.

        Raises :class:`FusionError` with TensorRT's message if it cannot build one.
        """
        if timing_cache is not None and timing_cache.is_file():
            self._timing = timing_cache.read_bytes()
        profiles = optimization_profiles(self._bundle.manifest, self._limits)
        return {
            name: tuple(self._engines(name, profiles[name], folder, timing_cache))
            for name in self._bundle.manifest.graphs
        }

    def largest_block(self) -> int:
        """Return the bytes of the largest block for weights that an engine needs.

        Raises :class:`FusionError` if no partition keeps it below ``--max-block``.
        """
        return max(largest_block(part) for name in self._bundle.manifest.graphs for part in self._parts(name)[0])

    def _parts(self, name: str) -> tuple[list[ModelProto], Pieces]:
        """Return the partitions of a graph as TensorRT gets them, and the pieces of its linears."""
        model = onnx.load(self._bundle.path(graph_file(name)), load_external_data=False)
        fix_dimension(model, "capacity", self._limits.max_context)
        use_attention(model)
        if self.decomposed:
            language = self._bundle.manifest.model.language
            groups = language.heads // language.kv_heads if name == LLM else 1
            decompose_operators(model, self.decomposed, groups)
        allow_decomposition(model)
        count, max_block = self._options.parts if name == LLM else 1, self._options.max_block
        pieces = Pieces() if max_block is None else cut_linears(model, max_block)
        return partition_graph(model, count, max_block, pieces.matmuls), pieces

    def _engines(
        self, name: str, profiles: list[DimensionRanges], folder: Path, timing_cache: Path | None
    ) -> Iterator[Engine]:
        parts, pieces = self._parts(name)
        for number, part in enumerate(parts, 1):
            label = name if len(parts) == 1 else f"{name} {number}/{len(parts)}"
            file = folder / f"{label.replace(' ', '-').replace('/', '-of-')}.engine"
            use_fp4(part)
            if self._uses_plugins:
                tensorrt_plugins.use_plugins(part)
            float16_reason = self._write(part, pieces, profiles, label, file)
            if timing_cache is not None and self._timing:
                write_whole(timing_cache, self._timing)
            entry = FileEntry(file.name, file.stat().st_size, digest(file))
            inputs, outputs = _tensors(part.graph.input), _tensors(part.graph.output)
            yield Engine(entry, inputs, outputs, tuple(profiles), float16_reason)

    def _write(
        self, model: ModelProto, pieces: Pieces, profiles: list[DimensionRanges], label: str, file: Path
    ) -> str | None:
        """Build and write one engine. Return the error for which it has float16 in place of INT8, if there was one.

        Raises :class:`FusionError`.
        """
        trt, float16_reason = self._library.module, None
        self._messages.clear()
        with Progress(f"Building {label}", 0, unit=None) as progress:
            canceled = Event()
            monitor = _monitor(trt, progress, canceled)
            plan = interruptible(lambda: self._plan(model, pieces, profiles, monitor), canceled.set)
            if plan is None and (float16 := self._in_float16(model)) is not None:
                float16_reason = self._messages.first_error()
                sys.stderr.write(
                    f"note: {label} failed ({float16_reason}); building it in float16 of the same weights\n"
                )
                self._messages.clear()
                model = float16
                plan = interruptible(lambda: self._plan(model, pieces, profiles, monitor), canceled.set)
        if plan is None:
            is_vision = label.startswith(VISION_ENCODER)
            int8 = " If INT8 is the reason, fusion-export --vision fp16." if is_vision and has_int8(model) else ""
            remedy = out_of_memory_remedy(self._messages.out_of_memory, this_jetson(), self._options.max_block)
            raise FusionError(
                f"{self._library.name} {self._library.version} cannot build {label} for compute capability "
                f"{self._platform.compute_capability}: {self._messages.first_error()}. {remedy}{int8}"
            )
        with file.open("wb") as output:
            output.write(memoryview(plan))
        return float16_reason

    def _in_float16(self, model: ModelProto) -> ModelProto | None:
        """Return a failed vision encoder without INT8; None for another graph, and after memory ran out.

        None also with ``--max-block``: float16 weights lie inside the graph, where nothing cuts them.
        """
        is_whole = model.graph.name == VISION_ENCODER and self._options.max_block is None
        return without_int8(model, self._bundle.folder) if is_whole and not self._messages.out_of_memory else None

    def _plan(self, model: ModelProto, pieces: Pieces, profiles: list[DimensionRanges], monitor: Any) -> Any:
        """Return the serialized engine (``IHostMemory``), or None if TensorRT cannot build it."""
        trt = self._library.module
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        # The parser looks for the data file in the folder of this path, and maps it into memory.
        content, path = pieces.filled(model, self._bundle.folder).SerializeToString(), self._bundle.folder / MANIFEST
        if not parser.parse(content, str(path)):
            self._messages.errors.insert(0, str(parser.get_error(0)) if parser.num_errors else "")
            return None
        config = self._config(builder, monitor)
        inputs = [(value.name, tensor_shape(value)) for value in model.graph.input]
        for ranges in profiles:
            profile = builder.create_optimization_profile()
            for name, sizes in inputs:
                if any(isinstance(size, str) for size in sizes):
                    profile.set_shape(name, *profile_shapes(sizes, ranges))
            config.add_optimization_profile(profile)
        if self._library.is_rtx:  # has no timing cache
            return builder.build_serialized_network(network, config)
        cache = config.create_timing_cache(self._timing)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # damaged, or of another GPU
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        if plan is not None:  # a build that failed may leave the cache in any state
            self._timing = bytes(memoryview(cache.serialize()))
        return plan

    def _config(self, builder: Any, monitor: Any) -> Any:
        trt, platform = self._library.module, self._platform
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        if self._options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._options.workspace)
        if self._library.is_rtx:
            config.num_compute_capabilities = 1
            config.set_compute_capability(compute_capability(trt, platform.compute_capability), 0)
            # CUDA graphs cannot capture a run that allocates memory.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self._uses_plugins:
            tensorrt_plugins.enable_aliasing(trt, config)
        return config


def _tensors(values: Iterable[ValueInfoProto]) -> tuple[Mapping[str, Any], ...]:
    return tuple({"name": value.name, "dtype": tensor_dtype(value), "shape": tensor_shape(value)} for value in values)


def compute_capability(trt: Any, written: str) -> Any:
    """Return TensorRT-RTX's member for a compute capability such as ``8.9``.

    Raises :class:`FusionError` for one that this version does not build for.
    """
    name = f"SM{written.replace('.', '')}"
    known = [one for one in dir(trt.ComputeCapability) if one.startswith("SM")]
    if name not in known:
        listed = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in sorted(known, key=lambda one: int(one[2:])))
        raise FusionError(
            f"{trt.__name__} {trt.__version__} does not support compute capability {written}; pass --device with one "
            f"of {listed}."
        )
    return getattr(trt.ComputeCapability, name)


def _monitor(trt: Any, progress: Progress, canceled: Event) -> Any:
    """Return a monitor that reports TensorRT's build steps. TensorRT calls it from any thread; phases may be nested."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.extend(num_steps)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            if canceled.is_set():  # an exception would abort the process
                return False
            progress.advance(1)
            return True

    return Monitor()
