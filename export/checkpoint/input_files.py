"""Read untrusted input files: regular files of limited size only."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.regular_file import open_regular

LARGEST_JSON = 1_500_000  # bytes: 10,000 tensor names. Parsed JSON needs up to 40 times as much memory
LONGEST_NAME = 500  # characters of a tensor's name; the longest known has 130
_GIT_LFS = b"version https://git-lfs"
_WEB_PAGE = "a web page, perhaps of a failed download: download the file again"
_PICKLE = "a pickle, which can run code when loaded: save the model with safe_serialization=True"
_SIGNATURES = {
    _GIT_LFS: "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"PK\x03\x04": "a zip archive, perhaps of torch.save: save the model with safe_serialization=True",
    b"\x80\x02\x8a": _PICKLE,
    b"\x80\x02}": _PICKLE,
    b"\x80\x04\x95": _PICKLE,
    b"GGUF": "a GGUF file, which holds no FUSION checkpoint: pass the checkpoint that it was converted from",
}
"""Description and remedy of a file that has the wrong format, by its first bytes."""


def read_file(path: Path, largest: int) -> bytes:
    """Return the content of a file of at most ``largest`` bytes.

    Raises :class:`FusionError` for a file that is missing, unreadable, larger, or a Git LFS pointer.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise FusionError(f"{path} is missing: pass a complete checkpoint folder, or download it again.") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if len(content) > largest:
        raise FusionError(f"{path} is too large; expected at most {largest} bytes. Download it again.")
    if content.startswith(_GIT_LFS):
        raise FusionError(f"{path} is {_SIGNATURES[_GIT_LFS]}.")
    return content


def unreadable(path: Path, error: OSError) -> FusionError:
    """Return the error for a file that the system cannot read."""
    return FusionError(f"{path} cannot be read ({error.strerror}): check its permissions and the disk.")


def identify_format(start: bytes) -> str | None:
    """Describe a file that has the wrong format, with the remedy, from its first bytes. Return None if unknown."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for signature, what in _SIGNATURES.items() if start.startswith(signature.lower())), None)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, with or without a byte order mark.

    Raises :class:`FusionError` as :func:`read_file`, and for a file over :data:`LARGEST_JSON` bytes, invalid JSON, a
    value that is not an object, or a duplicate field.
    """
    raw = read_file(path, LARGEST_JSON)
    try:
        value = json.loads(raw, object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        if what := identify_format(raw):
            raise FusionError(f"{path} is {what}.") from None
        raise FusionError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(value, dict):
        raise FusionError(f"{path} holds a JSON {type(value).__name__}; expected an object. Download it again.")
    return value


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's fields; pass it to ``json`` as ``object_pairs_hook``.

    Raises ``ValueError`` for a duplicate field. ``json`` itself silently keeps the last value.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        [(duplicate, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate field {duplicate[:LONGEST_NAME]!r}")
    return values
