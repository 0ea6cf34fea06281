"""A runner's half of a side-by-side comparison: one contestant measured alone in this process.

A runner is a module that measures one kind of model. It ends with

    if __name__ == "__main__":
        sys.exit(answer(measure, Workload, ("onnxruntime-genai",)))

and is run as ``python -m MODULE MODEL WORKLOAD`` by ``harness.py``, which reads the last line of its standard
output. Peers live in environments of their own: this module imports nothing but the standard library, so that what
fusion-edge depends on need not be installed there and does not count in the peer's memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

STATUS = Path("/proc/self/status")

W = TypeVar("W")


class CannotRunError(Exception):
    """What the user gave or the environment lacks; the message names it, what was expected and the remedy."""


@dataclass(frozen=True)
class Measured:
    """What a runner answers."""

    figures: Any
    """A dataclass of numbers, of the same type for all runners of a comparison."""
    settings: Mapping[str, Any]
    """What the peer was told: JSON values."""


def answer(
    measure: Callable[[Path, W], Measured],
    workload: Callable[..., W],
    packages: Sequence[str],
    argv: Sequence[str] | None = None,
) -> int:
    """Measure what the command line asks for and print it as one line of JSON; the exit code.

    ``workload`` is the dataclass that the request's fields go into, ``packages`` the distributions whose versions are
    worth knowing. A :class:`CannotRunError` is one line on standard error and exit code 1.
    """
    model, fields = sys.argv[1:] if argv is None else argv
    try:
        measured = measure(Path(model), workload(**json.loads(fields)))
    except CannotRunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    report = {
        "figures": dataclasses.asdict(measured.figures),
        "settings": dict(measured.settings),
        "versions": _versions(packages),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def peer(module: str, package: str) -> ModuleType:
    """A peer's module. Raises :class:`CannotRunError` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRunError(
            f"{package} cannot be imported by {sys.executable} ({error}): pip install {package} there, or name the "
            "environment that has it with --python."
        ) from None


def resident() -> int:
    """Bytes of this process in memory now, pages mapped from files included."""
    return _status("VmRSS")


def peak() -> int:
    """The most that was ever resident in this process, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """A line such as ``VmRSS:  1024 kB`` of Linux's ``/proc``, in bytes."""
    for line in STATUS.read_text(encoding="ascii").splitlines() if STATUS.is_file() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise CannotRunError(f"{STATUS} has no {field}; memory can be measured on Linux only.")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
