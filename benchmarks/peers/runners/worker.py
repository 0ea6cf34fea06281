"""Process that measures one contestant.

A runner is a module that measures one kind of model. It ends with

    if __name__ == "__main__":
        sys.exit(report(measure, LlmWorkload, ("onnxruntime-genai",)))

``harness.py`` runs it as ``python -m MODULE MODEL WORKLOAD SETTINGS`` and reads the last line of its output. Engines
live in their own environments, so this module imports the standard library only: fusion-edge's dependencies need not
be installed there and do not count in the engine's memory.
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

from fusion_edge.benchmarks.peers.runners.instruction_sets import INSTRUCTION_SETS

STATUS = Path("/proc/self/status")

W = TypeVar("W")
Settings = Mapping[str, Any]
"""Options of an engine that a comparison tries, as JSON values."""


class CannotRunError(Exception):
    """Wrong input or environment; the message names it, what was expected, and the remedy."""


@dataclass(frozen=True)
class Measurement:
    """Result of a runner."""

    figures: Any
    """Dataclass of numbers, the same type for all runners of a comparison."""
    settings: Settings
    """All options passed to the engine."""


def option(default: int, text: str) -> Any:
    """Return a field of a workload; the harness makes it an option with this help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Workload:
    """What every comparison has."""

    threads: int = option(2, "CPU threads")
    isa: str | None = dataclasses.field(
        default=None,
        metadata={"help": "hold every engine to an instruction set", "choices": tuple(INSTRUCTION_SETS)},
    )


def report(
    measure: Callable[[Path, W, Settings], Measurement],
    workload: Callable[..., W],
    packages: Sequence[str],
    argv: Sequence[str] | None = None,
) -> int:
    """Measure what the command line names and print one line of JSON; return the exit code.

    ``workload`` is the dataclass of the request's fields, ``packages`` the distributions whose versions are reported.
    A :class:`CannotRunError` becomes one line on standard error and exit code 1.
    """
    model, fields, settings = sys.argv[1:] if argv is None else argv
    try:
        measurement = measure(Path(model), workload(**json.loads(fields)), json.loads(settings))
    except CannotRunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    line = {
        "figures": dataclasses.asdict(measurement.figures),
        "settings": dict(measurement.settings),
        "versions": _versions(packages),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    return 0


def import_engine(module: str, package: str) -> ModuleType:
    """Import an engine's module. Raises :class:`CannotRunError` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRunError(
            f"{sys.executable} cannot import {module} ({error}); run pip install {package} there, or name another "
            "environment with --python."
        ) from None


def resident() -> int:
    """Return the resident bytes of this process, mapped file pages included."""
    return _status("VmRSS")


def peak() -> int:
    """Return the peak resident bytes of this process."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """Return the bytes of a line such as ``VmRSS:  1024 kB`` of ``/proc/self/status``."""
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
