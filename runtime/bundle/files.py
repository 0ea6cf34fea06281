"""Files that a manifest lists, each with its size and SHA-256, and the checks of both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fusion_edge.runtime.errors import FusionError

CHUNK_BYTES = 1 << 20
SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""Folders of a repository in the hub cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""


@dataclass(frozen=True)
class FileEntry:
    """One listed file."""

    path: str
    """Relative to the manifest's folder, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""


def digest(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return the SHA-256 of a file as hexadecimal text. ``advance`` receives the size of each chunk read."""
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            advance(len(chunk))
    return sha256.hexdigest()


def leads_outside(path: str) -> bool:
    """Return whether a listed path is absolute or leads upwards. Links are another question."""
    relative = PurePosixPath(path)
    return relative.is_absolute() or ".." in relative.parts


def is_snapshot(folder: Path) -> bool:
    """Return whether a folder is a snapshot of the hub cache, or inside one. Nobody else writes there."""
    path = folder.resolve()
    return any(
        inside.parent.name == SNAPSHOTS and (inside.parents[1] / BLOBS).is_dir()
        for inside in (path, *path.parents[:-2])
    )


def check_file(folder: Path, entry: FileEntry, listed_in: str, remedy: str) -> None:
    """Raise :class:`FusionError` unless a listed file exists inside ``folder``, or its hub cache, and has its size."""
    path = folder / entry.path
    if leads_outside(entry.path) or not _is_inside(path, folder):
        raise FusionError(f"{folder / listed_in} lists {entry.path!r}, which leads outside its folder; do not use it.")
    if not os.path.isfile(path):
        raise FusionError(f"{path} is missing though {listed_in} lists it. {remedy}")
    if (size := path.stat().st_size) != entry.size:
        raise FusionError(f"{path} has {size} bytes; {listed_in} says {entry.size}. {remedy}")


def check_digest(
    folder: Path, entry: FileEntry, listed_in: str, remedy: str, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Raise :class:`FusionError` unless a listed file has its SHA-256."""
    if digest(folder / entry.path, advance) != entry.sha256:
        raise FusionError(
            f"{folder / entry.path} has been altered: its SHA-256 is not the one in {listed_in}. {remedy}"
        )


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path leads into a folder, or is a link of the hub cache.

    In the cache ``snapshots/REVISION/NAME`` links to ``blobs/SHA`` of the same repository. Size and checksum in the
    manifest protect such a file as they protect any other.
    """
    try:
        file, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that no file can have
        return False
    caches = (parent.parent / BLOBS for parent in root.parents if parent.name == SNAPSHOTS)
    return file.is_relative_to(root) or any(file.is_relative_to(cache) for cache in caches)
