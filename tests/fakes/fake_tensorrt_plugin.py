"""A fake of ``tensorrt.plugin`` (TensorRT 10.9), which cannot be installed where the tests run.

It follows the description in ``kernels/tensorrt_plugins.py`` and checks more: sizes are symbols until the engine runs,
decorators compare signatures, and expressions passed to a kernel must be SymInt32. :func:`engine` calls the registered
functions in a builder's order.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import UnionType
from typing import Any

Sizes = dict[str, int]


class DataType(Enum):
    """Members of ``tensorrt.DataType`` that plugins may use."""

    FLOAT = "FP32"
    HALF = "FP16"
    BF16 = "BF16"
    INT64 = "INT64"


class SymInt32:
    """An expression of sizes: a number, the name of a size, or another expression."""

    def __init__(self, value: int | str | SymInt32 | Callable[[Sizes], int]) -> None:
        if not isinstance(value, (int, str, SymInt32)) and not callable(value):
            raise TypeError(f"Expected a number or an expression, got {value!r}.")
        self._value = value

    def at(self, sizes: Sizes) -> int:
        if isinstance(self._value, SymInt32):
            return self._value.at(sizes)
        if isinstance(self._value, str):
            return sizes[self._value]
        return self._value if isinstance(self._value, int) else self._value(sizes)

    def __mul__(self, other: int | ShapeExpr) -> ShapeExpr:
        return ShapeExpr(lambda sizes: self.at(sizes) * SymInt32(other).at(sizes))

    def __add__(self, other: int | ShapeExpr) -> ShapeExpr:
        return ShapeExpr(lambda sizes: self.at(sizes) + SymInt32(other).at(sizes))

    def __bool__(self) -> bool:
        raise TypeError("A size is not known while an engine is built.")


class ShapeExpr(SymInt32):
    """The size of an axis."""


def max(first: int | ShapeExpr, second: int | ShapeExpr) -> ShapeExpr:
    """Return the maximum. At least one argument must be an expression."""
    if isinstance(first, int) and isinstance(second, int):
        raise ValueError("Both arguments cannot be 'int's")
    left, right = SymInt32(first), SymInt32(second)
    return ShapeExpr(lambda sizes: -min(-left.at(sizes), -right.at(sizes)))


class SymIntExprs(list[SymInt32]):
    @classmethod
    def from_tuple(cls, expressions: Sequence[SymInt32]) -> SymIntExprs:
        for expression in expressions:
            if type(expression) is not SymInt32:
                raise TypeError(f"Extra args must be 'SymInt32's, not {expression!r}.")
        return cls(expressions)


class KernelLaunchParams:
    def __init__(self, **dimensions: int | ShapeExpr) -> None:
        names = [f"{kind}_{axis}" for kind in ("grid", "block") for axis in "xyz"]
        if unknown := set(dimensions) - {*names, "shared_mem"}:
            raise TypeError(f"There is no {unknown}.")
        given = {**dict.fromkeys(names, 1), "shared_mem": 0, **dimensions}
        self.dimensions = {name: SymInt32(value) for name, value in given.items()}


class TensorDesc:
    """An input or output. ``shape`` has -1 for variable sizes, and does not exist during ``register``."""

    def __init__(self, dtype: DataType, axes: Sequence[int | str], aliased_to: TensorDesc | None = None) -> None:
        self.dtype, self._axes, self.aliased_to = dtype, tuple(axes), aliased_to
        self.shape_expr = [ShapeExpr(axis) for axis in axes]
        self.has_shape = False

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.has_shape:
            raise ValueError("TensorDesc has no shape information available at this stage.")
        return tuple(axis if isinstance(axis, int) else -1 for axis in self._axes)

    def like(self) -> TensorDesc:
        return TensorDesc(self.dtype, self._axes)

    def aliased(self) -> TensorDesc:
        return TensorDesc(self.dtype, self._axes, aliased_to=self)

    def at(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(axis.at(sizes) for axis in self.shape_expr)


class AutoTuneCombination:
    """Combinations of types. ``|`` separates a tensor's alternatives; a single type applies to all of them."""

    def __init__(self, io_types: str, layouts: str = "LINEAR") -> None:
        assert layouts == "LINEAR"
        alternatives = [[DataType(name) for name in one.strip().split("|")] for one in io_types.split(",")]
        (count,) = {len(one) for one in alternatives if len(one) > 1} or {1}
        self.combinations = list(zip(*(one if len(one) > 1 else one * count for one in alternatives), strict=True))


@dataclass
class PluginDef:
    """The inputs and registered functions of a plugin."""

    inputs: list[str]
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)


QDP_REGISTRY: dict[str, PluginDef] = {}


def register(plugin_id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        namespace, name = plugin_id.split("::")
        if "." in plugin_id or namespace in ("", "trt", "tensorrt", "std"):
            raise ValueError(f"{plugin_id} is no valid name.")
        if plugin_id in QDP_REGISTRY:
            raise ValueError(f"There already is a definition for '{name}'.")
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
                raise ValueError(f"{parameter} is not positional or has a default.")
            if not issubclass(parameter.annotation, TensorDesc):
                raise ValueError(f"{parameter} is not marked as a TensorDesc.")
        if not issubclass(signature.return_annotation, TensorDesc):
            raise ValueError("No return annotation found for register function.")
        QDP_REGISTRY[plugin_id] = PluginDef(list(signature.parameters), {"register": function})
        return function

    return decorator


def autotune(plugin_id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return _checked(plugin_id, "autotune", ["outputs"], lambda _: None)


def aot_impl(plugin_id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def check(result: Any) -> None:
        if typing.get_origin(result) is not tuple:
            raise ValueError(f"Return annotation is {result}.")
        name, ptx, launch, extra = typing.get_args(result)
        for one in (name, ptx):
            kinds = typing.get_args(one) if isinstance(one, UnionType) else (one,)
            assert set(kinds) <= {str, bytes}
        assert issubclass(launch, KernelLaunchParams)
        assert issubclass(extra, SymIntExprs)

    return _checked(plugin_id, "aot_impl", ["outputs", "tactic"], check)


def _checked(
    plugin_id: str, kind: str, extra: list[str], check: Callable[[Any], None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        if plugin_id not in QDP_REGISTRY:
            raise ValueError(f"Plugin {plugin_id} is not registered.")
        signature = inspect.signature(function)
        expected = [*QDP_REGISTRY[plugin_id].inputs, *extra]
        if list(signature.parameters) != expected:
            raise ValueError(f"{signature} does not match the expected {expected}.")
        check(signature.return_annotation)
        QDP_REGISTRY[plugin_id].functions[kind] = function
        return function

    return decorator


@dataclass
class Layer:
    """A plugin in an engine."""

    types: list[tuple[DataType, ...]]
    """Combinations that autotune offers, each of inputs and output."""
    output: TensorDesc
    aliased_input: int | None
    name: str
    ptx: str
    launch: dict[str, SymInt32]
    extra: SymIntExprs


def engine(plugin_id: str, shapes: Sequence[Sequence[int | str]], types: tuple[DataType, ...]) -> Layer:
    """Build a layer from the shapes of its inputs, and the types of inputs and output.

    A size that is known only at run time is a str.
    """
    functions = QDP_REGISTRY[plugin_id].functions
    inputs = [TensorDesc(dtype, axes) for dtype, axes in zip(types[:-1], shapes, strict=True)]
    output = functions["register"](*inputs)
    assert isinstance(output, TensorDesc)
    aliased = [index for index, tensor in enumerate(inputs) if output.aliased_to is tensor]
    for tensor in (*inputs, output):
        tensor.has_shape = True
    combinations = [one for each in functions["autotune"](*inputs, (output,)) for one in each.combinations]
    if types not in combinations:
        raise ValueError(f"{plugin_id} does not support {types}.")
    name, ptx, launch, extra = functions["aot_impl"](*inputs, (output,), 0)
    assert isinstance(launch, KernelLaunchParams)
    assert isinstance(extra, SymIntExprs)
    return Layer(combinations, output, aliased[0] if aliased else None, name, ptx, launch.dimensions, extra)
