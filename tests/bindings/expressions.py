"""Stand-ins for the C++ objects that a TensorRT builder gives to ``tensorrt.plugin``, its Python module.

Sizes are symbols until an engine runs. All else is TensorRT's own: tensor descriptions, types, enumerations, and the
sources of ``tensorrt.plugin``. Names are those of the classes that are replaced, which :func:`installed` checks.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

Sizes = dict[str, int]
OPERATIONS: dict[str, Callable[[int, int], int]] = {"SUM": operator.add, "PROD": operator.mul, "MAX": max}
"""By name in ``tensorrt.DimensionOperation``. Our plugins need no others."""


class IDimensionExpr:
    """An integer that depends on sizes; :attr:`at` computes it."""

    def __init__(self, at: Callable[[Sizes], int], constant: int | None = None) -> None:
        self.at, self._constant = at, constant

    def is_constant(self) -> bool:
        return self._constant is not None

    def get_constant_value(self) -> int:
        assert self._constant is not None
        return self._constant


class DimsExprs(list[IDimensionExpr]):
    """The expressions of a shape."""

    def __init__(self, length: int) -> None:
        super().__init__([IExprBuilder().constant(0)] * length)


class IExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(lambda _: value, value)

    def operation(self, op: Any, first: IDimensionExpr, second: IDimensionExpr) -> IDimensionExpr:
        compute = OPERATIONS[op.name]
        return IDimensionExpr(lambda sizes: compute(first.at(sizes), second.at(sizes)))


class ISymExpr:
    """An argument of a kernel."""

    type: Any
    dtype: Any
    expr: IDimensionExpr


class ISymExprs(dict[int, ISymExpr]):
    """The arguments of a kernel by position."""

    nbSymExprs = 0


class KernelLaunchParams:
    grid_x: ISymExpr
    grid_y: ISymExpr
    grid_z: ISymExpr
    block_x: ISymExpr
    block_y: ISymExpr
    block_z: ISymExpr
    shared_mem: ISymExpr


class IPluginRegistry:
    """The creators of plugins."""

    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        self._creators[creator.name, creator.plugin_version, plugin_namespace] = creator
        return True

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        return self._creators.get((type, version, plugin_namespace))


STAND_INS = (IDimensionExpr, DimsExprs, IExprBuilder, ISymExpr, ISymExprs, KernelLaunchParams, IPluginRegistry)


def names_that_differ(trt: ModuleType) -> list[str]:
    """Return the public names of the stand-ins that the classes of TensorRT lack."""
    return [
        f"{one.__name__}.{name}"
        for one in STAND_INS
        for name in (*vars(one), *inspect.get_annotations(one))
        if not name.startswith("_") and not hasattr(getattr(trt, one.__name__), name)
    ]


@contextmanager
def installed(trt: ModuleType) -> Iterator[ModuleType]:
    """Import ``tensorrt.plugin`` on the stand-ins, without a registered plugin."""
    registry = IPluginRegistry()
    with pytest.MonkeyPatch.context() as patch:
        for one in (IDimensionExpr, DimsExprs, ISymExpr):  # those that the module creates or checks for
            patch.setattr(trt, one.__name__, one)
        patch.setattr(trt, "get_plugin_registry", lambda: registry)
        try:
            yield importlib.import_module("tensorrt.plugin")
        finally:
            for name in [one for one in sys.modules if one.split(".")[:2] == ["tensorrt", "plugin"]]:
                del sys.modules[name]


def dimensions(axes: Sequence[int | str]) -> DimsExprs:
    """Return the expressions of a shape whose variable sizes are names."""
    expressions = DimsExprs(0)
    for axis in axes:
        if isinstance(axis, int):
            expressions.append(IExprBuilder().constant(axis))
        else:
            expressions.append(IDimensionExpr(lambda sizes, name=axis: sizes[name]))  # type: ignore[misc]
    return expressions
