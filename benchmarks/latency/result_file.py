"""Header, writing and reading that every benchmark's JSON file shares.

Times are seconds, sizes bytes, rates per second. ``null`` is a value that the machine does not report.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from fusion_edge.benchmarks.latency.machine.info import MachineInfo
from fusion_edge.runtime.bundle.manifest import producer
from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import FusionError


@dataclass(frozen=True)
class Schema:
    """Name and version of a JSON file's schema."""

    name: str
    version: int
    """Raised with every change of a field's name or meaning."""
    command: str
    """Command that writes such a file."""


@dataclass(frozen=True)
class ResultFile:
    """Fields that every result starts with."""

    schema: str
    schema_version: int
    producer: str
    """Name and version of the program that wrote the file."""
    created: str
    """ISO 8601, UTC."""
    machine: MachineInfo

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


R = TypeVar("R", bound=ResultFile)


def header(schema: Schema, machine: MachineInfo) -> dict[str, Any]:
    """Return the fields of :class:`ResultFile` for a result of now."""
    return {
        "schema": schema.name,
        "schema_version": schema.version,
        "producer": producer(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
    }


def read_result_file(path: Path, kind: type[R], schema: Schema) -> R:
    """Read a result.

    Raises:
        FusionError: The file cannot be read, has another schema or version, or a field is wrong.
    """
    expected = f"expected a file that {schema.command} wrote"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FusionError(f"Cannot read {path} ({error}); {expected}.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or data.get("schema", schema.name) != schema.name:
        raise FusionError(f"{path} is not a {schema.name} result; {expected}.")
    if version != schema.version:
        raise FusionError(
            f"{path} has schema version {version}; this fusion-edge reads version {schema.version} only. "
            f"Measure again with {schema.command}."
        )
    try:
        return from_json(kind, data)
    except ValueError as error:
        raise FusionError(f"{path} is not a valid {schema.name} result ({error}); {expected}.") from None
