"""The classes of TensorRT that variables in our code hold, as far as the source tells.

A name has one type in a file, with or without leading underscores; a container has that of its elements.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

ANY = frozenset({"*"})
"""Objects that a function gets as an argument of type ``Any``."""
Results = Mapping[str, frozenset[str]]
"""Classes that a function or property returns, by dotted name; a class returns itself."""


class Types:
    """The types of the expressions in a file."""

    def __init__(self, tree: ast.Module, results: Results, dotted: Callable[[ast.expr], str | None]) -> None:
        """``dotted`` returns the name of an expression that is in TensorRT's module, or None."""
        self._results = results
        self._dotted = dotted
        self._names: dict[str, frozenset[str]] = {}
        """By variable; functions have a trailing ``()``."""
        before = None
        while before != self._names:  # until nothing more is learned
            before = dict(self._names)
            for node in ast.walk(tree):
                self._learn(node)

    def of(self, node: ast.expr) -> frozenset[str]:
        """Return the classes of TensorRT that an expression may hold: ``*`` for any, none if it is not known to."""
        if self._dotted(node) is not None:
            return frozenset()
        if isinstance(node, ast.Name):
            found = self._names.get(_key(node), frozenset())
        elif isinstance(node, ast.Attribute):
            found = self._names.get(_key(node), frozenset()) | self._member(node)
        elif isinstance(node, ast.Call):
            name, ours = self._dotted(node.func), self._names.get(f"{_key(node.func)}()", frozenset())
            member = self._member(node.func) if isinstance(node.func, ast.Attribute) else frozenset()
            found = ours | member if name is None else self._results.get(name, frozenset())
        else:
            found = frozenset().union(*map(self.of, _elements(node)))
        return found - ANY or found

    def _member(self, node: ast.Attribute) -> frozenset[str]:
        """Return what a member of an object is or returns."""
        owners = self.of(node.value)
        names = [f"{one}.{node.attr}" for one in owners - ANY]
        if owners == ANY:
            names = [name for name in self._results if name.endswith(f".{node.attr}")]
        return frozenset().union(*(self._results.get(name, frozenset()) for name in names))

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._bind(node.target, node.iter)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            self._bind(node.func.value, node.args[0])
        elif isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id == "Any":
            self._add(node.arg.lstrip("_"), ANY)
        elif isinstance(node, ast.FunctionDef):
            for one in ast.walk(node):
                if isinstance(one, ast.Return) and one.value is not None:
                    self._add(f"{node.name.lstrip('_')}()", self.of(one.value))

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            parts = value.elts if isinstance(value, ast.Tuple) else []
            if isinstance(value, ast.Call) and _key(value.func) == "zip":
                parts = value.args
            for one, part in zip(target.elts, parts, strict=False):
                self._bind(one, part)
        elif isinstance(target, (ast.Name, ast.Attribute)):
            self._add(_key(target), self.of(value))

    def _add(self, name: str, classes: frozenset[str]) -> None:
        if classes:
            self._names[name] = self._names.get(name, frozenset()) | classes


def _elements(node: ast.expr) -> list[ast.expr]:
    """Return the expressions of which an expression holds one or more."""
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return [node.value]
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        return [node.elt]
    if isinstance(node, (ast.List, ast.Tuple)):
        return node.elts
    return [node.body, node.orelse] if isinstance(node, ast.IfExp) else []


def _key(node: ast.expr) -> str:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_")
