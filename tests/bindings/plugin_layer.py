"""One plugin node, taken through every call that a TensorRT builder makes, in the sources of ``tensorrt.plugin``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bindings.expressions import (
    IDimensionExpr,
    IExprBuilder,
    ISymExprs,
    KernelLaunchParams,
    dimensions,
)

AXES = [f"{kind}_{axis}" for kind in ("grid", "block") for axis in "xyz"]


@dataclass
class Layer:
    """A plugin in an engine."""

    outputs: int
    output_types: list[Any]
    output_shape: list[IDimensionExpr]
    aliased_input: int
    """-1: the output has memory of its own."""
    types: list[Any]
    """Types of inputs and output that autotune offers, combination after combination."""
    formats: set[Any]
    tactics: list[int]
    launch: dict[str, IDimensionExpr]
    """Grid, block and shared memory."""
    arguments: list[IDimensionExpr]
    """Integers that TensorRT passes to the kernel."""
    kernel: tuple[str, bytes]
    """Entry point and PTX."""


def layer(trt: ModuleType, plugin_id: str, shapes: Sequence[Sequence[int | str]], types: Sequence[Any]) -> Layer:
    """Return the layer of a registered plugin for shapes of its inputs, and types of inputs and output.

    A size that is known only at run time is a str.
    """
    namespace, name = plugin_id.split("::")
    creator = trt.get_plugin_registry().get_creator(name, "1", namespace)
    nothing, phase, request = trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest
    plugin = creator.create_plugin(name, namespace, nothing, phase, request.STRICT_AOT)
    assert isinstance(plugin, trt.IPluginV3QuickAOTBuild)
    inputs, builder = [dimensions(axes) for axes in shapes], IExprBuilder()
    output_types = list(plugin.get_output_data_types(list(types[:-1]), [len(axes) for axes in shapes]))
    (output_shape,) = plugin.get_output_shapes(inputs, [], builder)
    output_axes = [one.get_constant_value() if one.is_constant() else "" for one in output_shape]
    described = [_description(trt, axes, one) for axes, one in zip((*shapes, output_axes), types, strict=True)]
    offered = plugin.get_supported_format_combinations(described, len(shapes))
    plugin.configure_plugin(described[:-1], described[-1:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(0)  # the default, when a plugin has no tactics of its own
    launch, arguments = KernelLaunchParams(), ISymExprs()
    plugin.get_launch_params(inputs, described, len(shapes), launch, arguments, builder)
    assert list(arguments) == list(range(arguments.nbSymExprs))
    for argument in (*arguments.values(), *vars(launch).values()):
        assert (argument.type, argument.dtype) == (trt.PluginArgType.INT, trt.PluginArgDataType.INT32)
    return Layer(
        plugin.get_num_outputs(),
        output_types,
        list(output_shape),
        plugin.get_aliased_input(0),
        [one.type for one in offered],
        {one.format for one in offered},
        tactics,
        {axis: getattr(launch, axis).expr for axis in (*AXES, "shared_mem")},
        [argument.expr for argument in arguments.values()],
        plugin.get_kernel([one.desc for one in described[:-1]], [described[-1].desc]),
    )


def _description(trt: ModuleType, axes: Sequence[int | str], dtype: Any) -> Any:
    """Return a tensor's description, with -1 for sizes that are known only at run time."""
    described = trt.DynamicPluginTensorDesc()
    described.desc.dims = trt.Dims([axis if isinstance(axis, int) else -1 for axis in axes])
    described.desc.type, described.desc.format = dtype, trt.TensorFormat.LINEAR
    return described
