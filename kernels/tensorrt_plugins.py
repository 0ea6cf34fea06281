"""The operators of ``onnx_functions.py`` as TensorRT plugins, each a kernel of ``triton/recursive_alignment.py``.

"Ahead of time": the engine holds the kernel's PTX, and neither Python nor a library is needed where it runs. TensorRT
has it since 10.9, in its module ``tensorrt.plugin``. What is relied on here, from "Writing custom operators with
TensorRT Python plugins", the reference of that module, and its source (NVIDIA/TensorRT,
python/packaging/bindings_wheel/tensorrt/plugin), where a decorator checks more than is documented:

- ``register("namespace::name")``: parameters are annotated as TensorDesc and so is what is returned; ``like()`` of an
  input for an output of its shape and type, ``aliased()`` for one in the same memory. TensorRT may copy such an input
  first, and silently gives the output memory of its own unless ``PreviewFeature.ALIASED_PLUGIN_IO_10_03`` is turned on
  (``IPluginV3OneBuildV2.get_aliased_input``): :func:`allow_in_place`.
- ``autotune``: the same parameters, then ``outputs``. It gives types and layouts of inputs and outputs, "LINEAR" for
  contiguous ones. TensorRT may choose any that it is given, whereas inputs' ``dtype`` is always the network's, and so
  is the kernel's: it is the only one given.
- ``aot_impl``: the same parameters, then ``outputs`` and ``tactic``, with an annotated result: the entry point's name,
  PTX, KernelLaunchParams and SymIntExprs. The last are expressions of sizes that are evaluated at run time, all of them
  SymInt32; so a kernel's other numbers are constants.
- The kernel is called with pointers to the inputs, these integers, and pointers to the outputs, and nothing else
  (``without_scratch`` in ``triton/ahead_of_time.py``; pytorch/TensorRT, py/torch_tensorrt/kernels/_triton.py,
  says that other launches fail). That an output in an input's memory is passed as well is not said anywhere; it is
  assumed, as there is no exception to be found.
- The ONNX parser takes a node's plugin from the attributes ``plugin_namespace`` and ``aot`` (NVIDIA/TensorRT,
  samples/python/quickly_deployable_plugins) and the operator's name; ``plugin_version`` is "1" without being said.

Whether TensorRT launches a plugin whose outputs are empty was not found documented, and the output of ``AddRows`` is
not empty where its positions are. CUDA refuses a grid of 0 blocks, so ours has one at the least; the kernels are told
the number of rows, and do nothing where it is 0. Nor is it documented what inputs hold while a builder times a plugin,
so ``AddRows`` skips positions that the sequence does not have.

None of this has been run in TensorRT: tests check it against a stand-in for that module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import GenericAlias, ModuleType
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, helper

from fusion_edge.kernels.onnx_functions.alignment import ADD_LAYER_NORM, ADD_ROWS, CONTEXT_ATTENTION
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.kernels.triton.ahead_of_time import ARCHITECTURES, CONTEXT, KERNELS, compiled
from fusion_edge.kernels.triton.kernel_folder import Compile
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS
from fusion_edge.runtime.errors import FusionError

MINIMUM_VERSION = (10, 9)
DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
"""Triton's names of the types that the kernels know, by that of ``tensorrt.DataType``."""


@dataclass(frozen=True)
class Plugin:
    """One operator; its inputs are those of its kernel, its output is shaped as the first of them."""

    operator: str
    kernel: str
    """In :data:`KERNELS`."""
    integers: Callable[..., tuple[Any, ...]]
    """What the kernel is told, from its inputs' shapes; the first is the number of rows."""
    blocks_of_row: int = 1
    in_place: bool = False

    @property
    def id(self) -> str:
        return f"{DOMAIN}::{self.operator}"

    @property
    def inputs(self) -> tuple[str, ...]:
        return KERNELS[self.kernel].inputs


PLUGINS = (
    Plugin(CONTEXT_ATTENTION, "context_attention", lambda q, k, v: (q[0] * q[1], q[1]), blocks_of_row=ALIGNMENT_HEADS),
    Plugin(ADD_LAYER_NORM, "add_layer_norm", lambda x, *_: (x[0] * x[1],)),
    Plugin(ADD_ROWS, "add_rows", lambda x, positions, *_: (positions[0] * positions[1], x[1]), in_place=True),
)


def supported(trt_module: ModuleType, architecture: str, has_kernels: bool) -> str | None:
    """Why this TensorRT cannot take the plugins for an architecture such as ``87``, in one sentence; None if it can.

    ``has_kernels``: they are compiled already, and Triton is not needed.
    """
    consequence = "the recursive alignment runs as standard operators"
    if trt_module.__name__ == "tensorrt_rtx":
        return f"TensorRT-RTX has no plugins: {consequence}"
    version = tuple(int(part) for part in trt_module.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        has, needs = (".".join(map(str, pair)) for pair in (version, MINIMUM_VERSION))
        return f"TensorRT {has} has no ahead-of-time plugins ({needs} has): {consequence}"
    if architecture not in ARCHITECTURES:
        return f"There are no kernels for sm_{architecture} ({', '.join(ARCHITECTURES)} have them): {consequence}"
    missing = [] if has_kernels else [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        remedy = "pip install '.[kernels]' in a clone of fusion-edge"
        return f"No --kernels, and {' and '.join(missing)} not installed ({remedy}): {consequence}"
    return None


def use_plugins(model: ModelProto) -> int:
    """Have TensorRT's parser take the plugins for the nodes of these operators; returns how many there are.

    The operators' functions are removed: a plugin that is not found is then an error, and not silently replaced. No
    other runtime can read the model any more, and TensorRT-RTX's process is aborted by it.
    """
    operators = {plugin.operator for plugin in PLUGINS}
    nodes = [node for node in _nodes(model.graph) if node.domain == DOMAIN and node.op_type in operators]
    for node in nodes:
        node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
        node.attribute.append(helper.make_attribute("aot", True))
    for function in [one for one in model.functions if one.domain == DOMAIN and one.name in operators]:
        model.functions.remove(function)
    return len(nodes)


def allow_in_place(trt_module: ModuleType, config: Any) -> None:
    """Turn aliased outputs on in a builder's configuration; every builder of these plugins must have them.

    Without, ``AddRows`` writes the latents' rows to new memory, and the sequence's others are whatever was there.
    """
    config.set_preview_feature(trt_module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def register(plugin_module: ModuleType, architecture: str, compile: Compile | None = None) -> None:
    """Register all plugins with ``tensorrt.plugin``, their kernels for one of :data:`ARCHITECTURES`.

    ``compile`` gives the kernels; None: Triton compiles them. Once a process: TensorRT refuses a second plugin of the
    same name with ValueError.
    """
    for plugin in PLUGINS:
        plugin_module.register(plugin.id)(_description(plugin, plugin_module))
        plugin_module.autotune(plugin.id)(_formats(plugin, plugin_module))
        plugin_module.aot_impl(plugin.id)(_implementation(plugin, plugin_module, architecture, compile or compiled))


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


def _implementation(plugin: Plugin, trtp: ModuleType, architecture: str, compile: Compile) -> Callable[..., Any]:
    def implement(*arguments: Any) -> Any:
        *inputs, _, _ = arguments  # outputs and tactic: nothing depends on them
        width = _constant_size(plugin, inputs, 0, -1)
        if plugin.operator == CONTEXT_ATTENTION and (rows := _constant_size(plugin, inputs, 1, 2)) != CONTEXT:
            raise FusionError(f"{plugin.operator}'s kernel attends to windows of {CONTEXT} rows, not of {rows}.")
        kernel = compile(plugin.kernel, architecture, width, _dtype(plugin, inputs[0]))
        integers = plugin.integers(*(tensor.shape_expr for tensor in inputs))
        launch = trtp.KernelLaunchParams(
            grid_x=trtp.max(integers[0], 1),
            grid_y=plugin.blocks_of_row,
            block_x=kernel.threads,
            shared_mem=kernel.shared_bytes,
        )
        passed = trtp.SymIntExprs.from_tuple([trtp.SymInt32(integer) for integer in integers])
        return kernel.name, kernel.ptx, launch, passed

    parameters = dict.fromkeys((*plugin.inputs, "outputs", "tactic"), inspect.Parameter.empty)
    result = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
    return _declared(implement, parameters, result)


def _dtype(plugin: Plugin, tensor: Any) -> str:
    """Triton's name of a tensor's type, which in capitals is TensorRT's."""
    name = tensor.dtype.name
    if name not in DTYPES:
        raise FusionError(f"{plugin.operator} has no kernel for {name}; it has for {', '.join(DTYPES)}.")
    return DTYPES[name]


def _constant_size(plugin: Plugin, inputs: list[Any], index: int, axis: int) -> int:
    size = int(inputs[index].shape[axis])
    if size < 0:
        name = plugin.inputs[index]
        raise FusionError(f"{plugin.operator}: axis {axis} of {name} must be constant, the kernel is compiled for it.")
    return size


def _declared(
    function: Callable[..., Any], parameters: dict[str, Any], result: Any = inspect.Signature.empty
) -> Callable[..., Any]:
    """The function with the signature that TensorRT's decorators look at: annotations of its parameters, by name."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    declared = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(declared, return_annotation=result)  # type: ignore[attr-defined]
    return function


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, also those of branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
