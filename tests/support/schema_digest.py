"""Digest of a JSON schema that is written as dataclasses."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, get_args, get_type_hints


def schema_digest(kind: type[Any]) -> str:
    """Return the start of the SHA-256 of all field names and types that are reachable from a dataclass."""
    lines = sorted(_fields(kind))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _fields(kind: Any) -> set[str]:
    if not dataclasses.is_dataclass(kind):
        return {line for argument in get_args(kind) for line in _fields(argument)}
    hints = get_type_hints(kind)
    lines = {f"{getattr(kind, '__name__', kind)}.{name}: {hint}" for name, hint in hints.items()}
    return lines.union(*map(_fields, hints.values()))
