"""What our code uses of TensorRT's Python modules: names, members of objects, calls, overridden methods.

Found in the source, so that nothing is left out. The modules have fixed names there: ``trt``, ``trt_module``, ``_trt``
and ``library.module``; ``trtp`` and ``plugin_module`` are ``tensorrt.plugin``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from support.paths import ROOT
from support.tensorrt_types import Results, Types

from fusion_edge.kernels.tensorrt_plugins import MINIMUM_VERSION

FOLDERS = ("benchmarks", "export", "kernels", "runtime")
MODULES = {"trt": "", "trt_module": "", "_trt": "", "trtp": "plugin.", "plugin_module": "plugin."}
"""Prefix of names by the variable that holds the module."""
FULL, RTX = "tensorrt", "tensorrt_rtx"


@dataclass(frozen=True)
class Condition:
    """Versions of TensorRT that a part of our code runs with."""

    library: str | None = None
    """None: both."""
    since: tuple[int, int] = (0, 0)
    """First version of full TensorRT."""

    def holds(self, library: str, version: str) -> bool:
        is_since = library == RTX or tuple(map(int, version.split(".")[:2])) >= self.since
        return self.library in (None, library) and is_since


CONDITIONS = {
    "benchmarks/kv_cache_formats.py": Condition(RTX),
    "runtime/backends/tensorrt/kernel_cache.py": Condition(RTX),
    "export/engines/builder.py:compute_capability": Condition(RTX),
    "kernels/tensorrt_plugins.py": Condition(FULL, MINIMUM_VERSION),
}
"""By file, or by file and function. Elsewhere ``if library.is_rtx`` is the condition, which is found in the source."""


@dataclass(frozen=True)
class Call:
    """Arguments of a call."""

    positional: int
    keywords: frozenset[str] = frozenset()
    has_more: bool = False
    """Whether a ``*`` or ``**`` adds others."""


@dataclass(frozen=True)
class Use:
    """One place that uses TensorRT."""

    place: str
    names: tuple[str, ...]
    """Name in the module, such as ``ILogger.Severity``; of an object's member one for each class it may have.

    ``*.parse`` is a member of an object of any class, given as an argument of type ``Any``.
    """
    condition: Condition
    call: Call | None = None
    is_assigned: bool = False
    is_override: bool = False


@cache
def sources() -> dict[str, ast.Module]:
    """Return our files that use a module of TensorRT, by path."""
    names = re.compile("|".join(rf"{name}\." for name in (*MODULES, "library.module")))  # parsing all takes seconds
    files = {file: file.read_text("utf-8") for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))}
    trees = {file.relative_to(ROOT).as_posix(): ast.parse(text) for file, text in files.items() if names.search(text)}
    return {path: tree for path, tree in trees.items() if module_names(tree)}


def module_names(tree: ast.Module) -> set[str]:
    """Return the names of the module in a file, such as ``ILogger`` and ``ILogger.Severity``."""
    names = {_dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in names if name is not None and not name.startswith("__")}


def attribute_names(tree: ast.Module) -> set[str]:
    """Return the names of all attributes and functions in a file; some are members of TensorRT's classes."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def all_uses(results: Results) -> list[Use]:
    """Return the uses in all files. ``results`` tells what the functions of TensorRT return."""
    return [use for path, tree in sources().items() for use in uses_of(path, tree, results)]


def uses_of(path: str, tree: ast.Module, results: Results) -> list[Use]:
    """Return the uses in a file."""
    return list(_Reader(path, Types(tree, results, _dotted)).block(tree.body, CONDITIONS.get(path, Condition())))


def _module_prefix(node: ast.expr) -> str | None:
    """Return the prefix of the names of a module, None if the expression is none."""
    if isinstance(node, ast.Attribute) and node.attr == "module":
        return "" if _name(node.value).strip("_") == "library" else None
    return MODULES.get(_name(node))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _dotted(node: ast.expr) -> str | None:
    """Return the dotted name of an attribute of a module, or of its attributes."""
    if not isinstance(node, ast.Attribute):
        return None
    prefix = _module_prefix(node.value)
    if prefix is not None:
        return prefix + node.attr
    outer = _dotted(node.value)
    return None if outer is None else f"{outer}.{node.attr}"


class _Reader:
    def __init__(self, path: str, types: Types) -> None:
        self._path, self._types = path, types

    def block(self, statements: Sequence[ast.AST], condition: Condition) -> Iterator[Use]:
        """Yield the uses of statements in order. After ``if is_rtx: return`` the rest is for full TensorRT."""
        for statement in statements:
            yield from self._node(statement, condition)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], (ast.Return, ast.Raise)):
                _, condition = _branches(statement.test, condition)

    def _node(self, node: ast.AST, condition: Condition) -> Iterator[Use]:
        if isinstance(node, (ast.If, ast.IfExp)):
            then, otherwise = _branches(node.test, condition)
            yield from self._node(node.test, condition)
            yield from self.block(node.body if isinstance(node, ast.If) else [node.body], then)
            yield from self.block(node.orelse if isinstance(node, ast.If) else [node.orelse], otherwise)
        elif isinstance(node, ast.Attribute):
            yield from self._attribute(node, condition)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call = _call(node, is_unbound=node.func.attr == "__init__")
            yield from self._attribute(node.func, condition, call)
            yield from self.block([*node.args, *(one.value for one in node.keywords)], condition)
        elif isinstance(node, ast.FunctionDef):
            yield from self._children(node, CONDITIONS.get(f"{self._path}:{node.name}", condition))
        else:
            if isinstance(node, ast.ClassDef):
                yield from self._overrides(node, condition)
            yield from self._children(node, condition)

    def _children(self, node: ast.AST, condition: Condition) -> Iterator[Use]:
        for _, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            yield from self.block([one for one in children if isinstance(one, ast.AST)], condition)

    def _attribute(self, node: ast.Attribute, condition: Condition, call: Call | None = None) -> Iterator[Use]:
        name = _dotted(node)
        if name is None:
            yield from self._node(node.value, condition)
            classes = sorted(self._types.of(node.value)) if node.attr not in dir(list) else []
            names = tuple(f"{one}.{node.attr}" for one in classes)
        else:
            names = (name,) if not name.startswith("__") else ()
        if names:
            yield Use(f"{self._path}:{node.lineno}", names, condition, call, isinstance(node.ctx, ast.Store))

    def _overrides(self, node: ast.ClassDef, condition: Condition) -> Iterator[Use]:
        for base in filter(None, map(_dotted, node.bases)):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                    place, call = f"{self._path}:{method.lineno}", Call(len(method.args.args) - 1)
                    yield Use(place, (f"{base}.{method.name}",), condition, call, is_override=True)


def _branches(test: ast.expr, condition: Condition) -> tuple[Condition, Condition]:
    """Return the conditions of both branches of an ``if``."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        then, otherwise = _branches(test.operand, condition)
        return otherwise, then
    if isinstance(test, ast.Attribute) and test.attr == "is_rtx":
        return replace(condition, library=RTX), replace(condition, library=FULL)
    return condition, condition


def _call(node: ast.Call, is_unbound: bool) -> Call:
    """Return the arguments of a call; without ``self`` if the function is not bound."""
    has_more = any(isinstance(one, ast.Starred) for one in node.args) or any(one.arg is None for one in node.keywords)
    positional = sum(not isinstance(one, ast.Starred) for one in node.args)
    keywords = frozenset(one.arg for one in node.keywords if one.arg is not None)
    return Call(positional - is_unbound, keywords, has_more)
