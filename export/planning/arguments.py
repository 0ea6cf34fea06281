"""Command-line options as dataclass fields: type, default, flag and help are declared once, at the field."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_KEY = "argument"


@dataclass(frozen=True)
class _Argument:
    """Command-line option of a field."""

    group: str
    """Title of the help section."""
    flags: Mapping[str, str]
    """Help by flag; ``{default}`` in it is replaced by the field's default."""
    settings: Mapping[str, Any]
    """Further arguments of ``add_argument``."""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Value by flag, for flags without an argument."""
    exclusive: str = ""
    """Fields with the same text exclude each other."""


def option(
    flag: str,
    help: str,
    *,
    group: str,
    default: Any = None,
    type: Callable[[str], Any] | None = None,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    exclusive: str = "",
) -> Any:
    """Return a dataclass field that ``flag VALUE`` sets; the other arguments are those of ``add_argument``."""
    settings = {"type": type, "choices": choices, "metavar": metavar}
    given = {key: value for key, value in settings.items() if value is not None}
    return _field(default, _Argument(group, {flag: help}, given, exclusive=exclusive))


def switch(flag: str, help: str, *, group: str) -> Any:
    """Return a boolean dataclass field that ``flag`` sets to true."""
    return _field(False, _Argument(group, {flag: help}, {"action": "store_const"}, {flag: True}))


def choice(values: Mapping[str, str], *, group: str, default: Any = None) -> Any:
    """Return a dataclass field with a flag ``--VALUE`` for each of its values; ``values`` has their help."""
    flags = {f"--{value}": text for value, text in values.items()}
    constants = {f"--{value}": value for value in values}
    exclusive = " ".join(flags)
    return _field(default, _Argument(group, flags, {"action": "store_const"}, constants, exclusive))


def _field(default: Any, argument: _Argument) -> Any:
    return dataclasses.field(default=default, metadata={_KEY: argument})


def add_options(groups: Mapping[str, argparse._ArgumentGroup], options: type) -> None:
    """Add the options that the fields of the dataclass ``options`` declare to their groups.

    The namespace has no attribute for an option that is not given (see :func:`given`).
    """
    sets: dict[str, argparse._MutuallyExclusiveGroup] = {}
    for field, argument in _declared(options):
        parent: Any = groups[argument.group]
        if argument.exclusive:
            if argument.exclusive not in sets:
                sets[argument.exclusive] = parent.add_mutually_exclusive_group()
            parent = sets[argument.exclusive]
        for flag, text in argument.flags.items():
            constant = {"const": argument.values[flag]} if argument.values else {}
            parent.add_argument(
                flag,
                dest=field.name,
                default=argparse.SUPPRESS,
                help=text.replace("{default}", str(field.default)),
                **argument.settings,
                **constant,
            )


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the values of the options that are given, by field."""
    names = [field.name for field, _ in _declared(options)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def flag_of(options: type, name: str) -> str:
    """Return the flag that sets a field."""
    return next(next(iter(argument.flags)) for field, argument in _declared(options) if field.name == name)


def _declared(options: type) -> list[tuple[dataclasses.Field[Any], _Argument]]:
    """Return the fields of a dataclass that are options, in order."""
    fields = dataclasses.fields(options)
    return [(field, field.metadata[_KEY]) for field in fields if _KEY in field.metadata]
