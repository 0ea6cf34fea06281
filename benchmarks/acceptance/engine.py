"""Engines of single operators: build, inspect, run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from fusion_edge.benchmarks.acceptance.comparison import largest_error
from fusion_edge.benchmarks.acceptance.device import NoCuda, downloaded, find_cuda, seconds_of, uploaded
from fusion_edge.benchmarks.acceptance.steps import SkippedStep, Workspace
from fusion_edge.export.engines.builder import compute_capability
from fusion_edge.export.engines.graph_values import tensor_shape
from fusion_edge.export.engines.optimization_profiles import DimensionRanges, profile_shapes
from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages, find_library, first_library
from fusion_edge.runtime.backends.tensorrt.memory import DeviceMemory
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.output_file import write_whole

Layers = Sequence[Mapping[str, Any]]
"""Layers of an engine: ``Name``, ``LayerType``, ``Outputs`` with ``Dimensions``, and more."""
LAYERS_SUFFIX = ".layers.json"
WITHOUT_GPU = "8.9"
"""Compute capability to build for without a GPU: the oldest with FP8."""


@dataclass(frozen=True)
class Target:
    """What builds engines, and for what."""

    library: Library
    compute_capability: str
    cuda: Cuda | NoCuda
    """Or why engines are built and not run."""

    @property
    def capability(self) -> tuple[int, ...]:
        """Return major and minor version of the compute capability."""
        return tuple(map(int, self.compute_capability.split(".")))


def find_target() -> Target:
    """Return this machine's GPU and TensorRT; without CUDA, TensorRT-RTX. Raises :class:`SkippedStep`."""
    cuda = find_cuda()
    try:
        if isinstance(cuda, NoCuda):
            return Target(find_library("tensorrt-rtx"), WITHOUT_GPU, cuda)
        return Target(library_for(cuda), cuda.compute_capability(), cuda)
    except DeviceError as error:
        if isinstance(cuda, Cuda):
            raise SkippedStep(f"There is no TensorRT: {error}") from None
        # With a GPU, CUDA is what to repair.
        alone = "" if cuda.has_gpu else f" Only TensorRT-RTX builds without one: {error}"
        raise SkippedStep(f"{cuda}{alone}") from None


def library_for(cuda: Cuda) -> Library:
    """Return the TensorRT that builds for a GPU.

    Raises :class:`DeviceError` without TensorRT, :class:`SkippedStep` for TensorRT-RTX that does not build for the GPU.
    """
    library = first_library()
    if library.is_rtx:
        try:
            compute_capability(library.module, cuda.compute_capability())
        except FusionError as error:
            raise SkippedStep(str(error)) from None
    return library


@dataclass(frozen=True)
class OperatorCase:
    """A graph of one operator, with inputs and outputs."""

    model: ModelProto
    inputs: Mapping[str, npt.NDArray[Any]]
    expected: Mapping[str, npt.NDArray[np.float64]]
    tolerance: float = 0.0
    """Absolute, beside the rounding of the result."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Input by the output that has its memory."""
    ranges: DimensionRanges = field(default_factory=dict)
    """Sizes of symbolic dimensions."""
    uses_plugins: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine."""

    plan: bytes
    layers: Layers
    """As the builder's messages list them; empty for versions that do not."""


def build(target: Target, case: OperatorCase) -> BuiltEngine:
    """Build an engine. Raises :class:`FusionError`."""
    trt = target.library.module
    log = BuildLog(target.library, verbose=True)
    logger = log.logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(case.model.SerializeToString()):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise FusionError(f"TensorRT's parser refuses the operator: {reasons or log.first_error()}.")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target.library.is_rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(compute_capability(trt, target.compute_capability), 0)
    if case.uses_plugins:
        tensorrt_plugins.enable_aliasing(trt, config)
    if case.ranges:
        profile = builder.create_optimization_profile()
        for value in case.model.graph.input:
            if any(isinstance(size, str) for size in tensor_shape(value)):
                profile.set_shape(value.name, *profile_shapes(tensor_shape(value), case.ranges))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise FusionError(f"TensorRT cannot build the operator: {log.first_error()}.")
    return BuiltEngine(bytes(memoryview(plan)), log.layers())


@dataclass
class BuildLog(Messages):
    """Keeps all messages of TensorRT, too."""

    texts: list[str] = field(default_factory=list)

    def add(self, message: str, is_error: bool) -> None:
        """Add a message of the logger."""
        self.texts.append(message)
        super().add(message, is_error)

    def layers(self) -> Layers:
        """Return the layers that a builder with detailed profiling has listed."""
        return logged_layers("\n".join(self.texts))


LOGGED_LAYER = re.compile(r"^Name: (\S+), LayerType: (\w+), .*?Outputs: \[(.*?)\], TacticName: ([^,]*),", re.MULTILINE)


def logged_layers(messages: str) -> Layers:
    """Return the layers in the messages of a builder with detailed profiling, in the inspector's form."""
    return [
        {
            "Name": name,
            "LayerType": kind,
            "Outputs": [
                {"Dimensions": [int(size) for size in sizes.split(",") if size]}
                for sizes in re.findall(r"Dimensions: \[([\d,]*)\]", outputs)
            ],
            "TacticName": tactic,
        }
        for name, kind, outputs, tactic in LOGGED_LAYER.findall(messages)
    ]


@dataclass(frozen=True)
class EngineRun:
    """An engine that ran."""

    largest_error: float
    seconds: float
    layers: Layers
    """As TensorRT's engine inspector describes them."""


def run(target: Target, plan: bytes, case: OperatorCase, label: str, workspace: Workspace) -> EngineRun:
    """Run an engine, compare its outputs, and write its layers to the workspace. Raises :class:`FusionError`."""
    assert isinstance(target.cuda, Cuda)
    trt, cuda = target.library.module, target.cuda
    log = Messages(target.library, verbose=True)
    logger = log.logger()
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise FusionError(f"TensorRT cannot load the engine that it has built: {log.first_error()}.")
    layers = _layers(trt, engine)
    write_whole(workspace.output / f"{label.replace(' ', '-')}{LAYERS_SUFFIX}", json.dumps(layers, indent=1) + "\n")
    memory, stream = DeviceMemory(cuda), cuda.stream()
    pointers = {name: uploaded(memory, array, stream) for name, array in case.inputs.items()}
    results = {name: np.full(array.shape, np.nan, np.float16) for name, array in case.expected.items()}
    for name, array in results.items():
        alias = case.aliases.get(name)
        pointers[name] = uploaded(memory, array, stream) if alias is None else pointers[alias]
    context = engine.create_execution_context()
    if context is None:
        raise FusionError(f"TensorRT cannot prepare the engine: {log.first_error()}.")
    for name, pointer in pointers.items():
        if name in case.inputs and case.ranges:
            context.set_input_shape(name, case.inputs[name].shape)
        context.set_tensor_address(name, pointer)
    if not context.execute_async_v3(stream):
        raise FusionError(f"TensorRT cannot run the engine: {log.first_error()}.")
    errors = [
        largest_error(
            f"{label}, {name}", downloaded(memory, pointers[name], array, stream), case.expected[name], case.tolerance
        )
        for name, array in results.items()
    ]
    seconds = seconds_of(cuda, stream, partial(context.execute_async_v3, stream))
    del context, engine, runtime  # in this order, before the memory
    memory.close()
    cuda.destroy_stream(stream)
    return EngineRun(max(errors), seconds, layers)


def _layers(trt: Any, engine: Any) -> Layers:
    inspector = engine.create_engine_inspector()
    described = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in described["Layers"]]


def writes_tensor_of(layers: Layers, elements: int) -> bool | None:
    """Return whether a layer writes a tensor of that many elements; None if the layers list no outputs.

    A layer that writes a tensor as large as the weights has dequantized them for another layer.
    """
    outputs = [output for layer in layers for output in layer.get("Outputs", ())]
    if not outputs:
        return None
    return any(int(np.prod(output["Dimensions"])) == elements for output in outputs)
