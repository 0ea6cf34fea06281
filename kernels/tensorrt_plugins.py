"""TensorRT plugins of the recursive alignment's operators: each runs a kernel of ``triton/recursive_alignment.py``.

The plugins are "ahead of time": the engine holds the PTX, and the device needs neither Python nor a plugin library.
TensorRT supports them since 10.9, in its module ``tensorrt.plugin``. This file relies on the following, from "Writing
custom operators with TensorRT Python plugins", the module's reference, and its source (NVIDIA/TensorRT,
python/packaging/bindings_wheel/tensorrt/plugin), whose decorators check more than is documented:

- ``register("namespace::name")``: parameters and result are annotated as TensorDesc. ``like()`` of an input returns an
  output of its shape and type, ``aliased()`` one in its memory. TensorRT may copy such an input first, and gives the
  output separate memory without a warning unless ``PreviewFeature.ALIASED_PLUGIN_IO_10_03`` is on
  (``IPluginV3OneBuildV2.get_aliased_input``); see :func:`enable_aliasing`.
- ``autotune``: the same parameters, then ``outputs``. Returns types and layouts of inputs and outputs ("LINEAR":
  contiguous). TensorRT may choose any of them, while ``dtype`` of an input is always the network's. So the plugins
  offer that type only, for which the kernel is compiled.
- ``aot_impl``: the same parameters, then ``outputs`` and ``tactic``, with an annotated result: entry point, PTX,
  KernelLaunchParams and SymIntExprs. The last are expressions of sizes, evaluated at run time, all SymInt32. So other
  numbers of a kernel are constants.
- TensorRT passes a kernel pointers to the inputs, then these integers, then pointers to the outputs, and nothing else
  (``strip_scratch_parameters`` in ``triton/ahead_of_time.py``; pytorch/TensorRT,
  py/torch_tensorrt/kernels/_triton.py, reports that other launches fail). Whether it also passes an output that shares
  an input's memory is not documented. The plugins assume it.
- The ONNX parser selects a plugin by the operator's name and the node's attributes ``plugin_namespace`` and ``aot``
  (NVIDIA/TensorRT, samples/python/quickly_deployable_plugins). ``plugin_version`` defaults to "1".

Not documented: whether TensorRT launches a plugin with empty outputs, and what inputs hold while a builder times a
plugin. So the grid has at least one block (CUDA rejects an empty one), the kernels get the number of rows and return if
there are none, and ``AddRows`` skips positions outside of the sequence.

The plugins have not run in an engine. Tests take them through all calls of a builder in that source, of TensorRT 10.9
to 11 (``tests/bindings/``); only the expressions, which are C++ objects, are stand-ins there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import GenericAlias, ModuleType
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, helper

from fusion_edge.kernels.onnx_functions.alignment import ADD_LAYER_NORM, ADD_ROWS, CONTEXT_ATTENTION
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.kernels.triton.ahead_of_time import ARCHITECTURES, CONTEXT_ROWS, KERNELS, compile_kernel
from fusion_edge.kernels.triton.kernel_folder import KernelSource
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS
from fusion_edge.runtime.errors import FusionError

MINIMUM_VERSION = (10, 9)
DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
"""Triton's name of each supported type, by the name in ``tensorrt.DataType``."""


@dataclass(frozen=True)
class Plugin:
    """Plugin of one operator. Inputs are those of its kernel; the output has the shape of the first."""

    operator: str
    kernel: str
    """Name in :data:`KERNELS`."""
    integers: Callable[..., tuple[Any, ...]]
    """Return the kernel's integers from the shapes of its inputs. The first is the number of rows."""
    blocks_per_row: int = 1
    in_place: bool = False

    @property
    def id(self) -> str:
        return f"{DOMAIN}::{self.operator}"

    @property
    def inputs(self) -> tuple[str, ...]:
        return KERNELS[self.kernel].inputs

    def launch(
        self, *shapes: Sequence[Any], maximum: Callable[[Any, int], Any] = max
    ) -> tuple[tuple[Any, int], tuple[Any, ...]]:
        """Return the grid, and the kernel's integers, for the shapes of its inputs.

        Sizes are numbers, or TensorRT's expressions of them with their ``maximum``.
        """
        integers = self.integers(*shapes)
        return (maximum(integers[0], 1), self.blocks_per_row), integers


PLUGINS = (
    Plugin(CONTEXT_ATTENTION, "context_attention", lambda q, k, v: (q[0] * q[1], q[1]), blocks_per_row=ALIGNMENT_HEADS),
    Plugin(ADD_LAYER_NORM, "add_layer_norm", lambda x, *_: (x[0] * x[1],)),
    Plugin(ADD_ROWS, "add_rows", lambda x, positions, *_: (positions[0] * positions[1], x[1]), in_place=True),
)


def unsupported_reason(trt_module: ModuleType, architecture: str, has_kernels: bool) -> str | None:
    """Return why this TensorRT cannot use the plugins for an architecture (as ``87``), or None if it can.

    ``has_kernels``: the kernels are compiled already, so Triton is not needed.
    """
    consequence = "the recursive alignment runs as standard operators"
    if trt_module.__name__ == "tensorrt_rtx":
        return f"TensorRT-RTX has no plugins: {consequence}"
    version = tuple(int(part) for part in trt_module.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        has, needs = (".".join(map(str, pair)) for pair in (version, MINIMUM_VERSION))
        return f"TensorRT {has} has no ahead-of-time plugins (needs {needs}): {consequence}"
    if architecture not in ARCHITECTURES:
        return f"There are no kernels for sm_{architecture}, only for {', '.join(ARCHITECTURES)}: {consequence}"
    missing = [] if has_kernels else [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        remedy = "pip install '.[kernels]' in a clone of fusion-edge"
        return f"No --kernels, and {' and '.join(missing)} not installed ({remedy}): {consequence}"
    return None


def use_plugins(model: ModelProto) -> int:
    """Mark the nodes of these operators as plugins for TensorRT's parser; return their number.

    Removes the operators' functions, so a missing plugin is an error instead of a silent fallback. No other runtime can
    read the model afterwards, and TensorRT-RTX aborts the process on it.
    """
    operators = {plugin.operator for plugin in PLUGINS}
    nodes = [node for node in _nodes(model.graph) if node.domain == DOMAIN and node.op_type in operators]
    for node in nodes:
        node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
        node.attribute.append(helper.make_attribute("aot", True))
    for function in [one for one in model.functions if one.domain == DOMAIN and one.name in operators]:
        model.functions.remove(function)
    return len(nodes)


def enable_aliasing(trt_module: ModuleType, config: Any) -> None:
    """Enable aliased outputs in a builder's configuration. Every builder of these plugins needs it.

    Without it ``AddRows`` writes the latents' rows to new memory, whose other rows are undefined.
    """
    config.set_preview_feature(trt_module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def register(plugin_module: ModuleType, architecture: str, source: KernelSource | None = None) -> None:
    """Register all plugins with ``tensorrt.plugin``, for one of :data:`ARCHITECTURES`.

    ``source`` returns the kernels; None: Triton compiles them. Call it once per process: TensorRT raises ValueError
    for a second plugin of the same name.
    """
    for plugin in PLUGINS:
        plugin_module.register(plugin.id)(_description(plugin, plugin_module))
        plugin_module.autotune(plugin.id)(_formats(plugin, plugin_module))
        plugin_module.aot_impl(plugin.id)(
            _implementation(plugin, plugin_module, architecture, source or compile_kernel)
        )


def _description(plugin: Plugin, trtp: ModuleType) -> Callable[..., Any]:
    def describe(first: Any, *_: Any) -> Any:
        return first.aliased() if plugin.in_place else first.like()

    return _declared(describe, dict.fromkeys(plugin.inputs, trtp.TensorDesc), trtp.TensorDesc)


def _formats(plugin: Plugin, trtp: ModuleType) -> Callable[..., Any]:
    def combinations(*inputs: Any) -> Any:
        dtype = _dtype(plugin, inputs[0]).upper()
        types = ["INT64" if name == "positions" else dtype for name in (*plugin.inputs, "output")]
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR")]

    return _declared(combinations, dict.fromkeys((*plugin.inputs, "outputs"), inspect.Parameter.empty))


def _implementation(plugin: Plugin, trtp: ModuleType, architecture: str, source: KernelSource) -> Callable[..., Any]:
    def implement(*arguments: Any) -> Any:
        *inputs, _, _ = arguments  # outputs and tactic are not needed
        width = _constant_size(plugin, inputs, 0, -1)
        if plugin.operator == CONTEXT_ATTENTION and (rows := _constant_size(plugin, inputs, 1, 2)) != CONTEXT_ROWS:
            raise FusionError(f"{plugin.operator}'s kernel has context windows of {CONTEXT_ROWS} rows, not of {rows}.")
        kernel = source(plugin.kernel, architecture, width, _dtype(plugin, inputs[0]))
        (grid_x, grid_y), integers = plugin.launch(*(tensor.shape_expr for tensor in inputs), maximum=trtp.max)
        launch = trtp.KernelLaunchParams(
            grid_x=grid_x,
            grid_y=grid_y,
            block_x=kernel.threads,
            shared_mem=kernel.shared_bytes,
        )
        passed = trtp.SymIntExprs.from_tuple([trtp.SymInt32(integer) for integer in integers])
        return kernel.name, kernel.ptx, launch, passed

    parameters = dict.fromkeys((*plugin.inputs, "outputs", "tactic"), inspect.Parameter.empty)
    result = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
    return _declared(implement, parameters, result)


def _dtype(plugin: Plugin, tensor: Any) -> str:
    """Return Triton's name of a tensor's type. TensorRT has the same name in capitals."""
    name = tensor.dtype.name
    if name not in DTYPES:
        raise FusionError(f"{plugin.operator} has no kernel for {name}, only for {', '.join(DTYPES)}.")
    return DTYPES[name]


def _constant_size(plugin: Plugin, inputs: list[Any], index: int, axis: int) -> int:
    size = int(inputs[index].shape[axis])
    if size < 0:
        name = plugin.inputs[index]
        raise FusionError(f"{plugin.operator}: axis {axis} of {name} must be constant: the kernel is compiled for it.")
    return size


def _declared(
    function: Callable[..., Any], parameters: dict[str, Any], result: Any = inspect.Signature.empty
) -> Callable[..., Any]:
    """Set the signature that TensorRT's decorators inspect, with annotations by parameter; return the function."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    declared = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(declared, return_annotation=result)  # type: ignore[attr-defined]
    return function


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield all nodes, including those of branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
