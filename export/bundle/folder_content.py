"""List and delete what fusion-edge wrote into a folder, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fusion_edge.export.bundle.folder_lock import FOLDER_FLAGS
from fusion_edge.runtime.errors import FusionError

Owns = Callable[[str], bool]
"""Return whether fusion-edge wrote a path, relative to its folder. Paths of folders end with a slash."""

REPLACED_MANIFEST = "replaced.json"
"""Manifest of the replaced content, or an empty file. In a partial folder whose files move into a mount point."""


@dataclass(frozen=True)
class FolderContent:
    """Files that a command writes into a folder, and may delete there."""

    command: str
    """Verb in messages, such as "export"."""
    files: tuple[str, ...]
    """Patterns of file names."""
    manifest: str
    """Name of the file that is written last."""
    listed: Callable[[Path], Collection[str]] | None = None
    """Return the files that a manifest lists; only those are owned. None: all files that match are."""
    additions: tuple[str, ...] = ()
    """Patterns of what other commands add later. Folders end with a slash."""

    def is_partial(self, path: str) -> bool:
        """Return whether ``path`` may be in a partial folder: new files, or old ones swapped into it."""
        return matches(path, *self.files, self.manifest, f".{self.manifest}.*", REPLACED_MANIFEST, *self.additions)

    def written_with(self, manifest: Path) -> Owns:
        """Return a test for paths written together with ``manifest``, which is one of them."""
        listed = None if self.listed is None else self.listed(manifest)
        return lambda path: path == self.manifest or (matches(path, *self.files) and (listed is None or path in listed))

    def owned(self, manifest: Path) -> Owns:
        """Return a test for paths written together with ``manifest`` or added later."""
        written = self.written_with(manifest)
        return lambda path: written(path) or matches(path, *self.additions)


class ForeignPathError(FusionError):
    """A folder holds something that fusion-edge did not write."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} was not written by fusion-edge and is not deleted; move it or choose another output.")
        self.path = path


def matches(path: str, *patterns: str) -> bool:
    """Return whether a relative path matches a pattern. ``*`` matches anything but a slash."""
    parts = path.split("/")
    split = [pattern.split("/") for pattern in patterns]
    return any(
        len(parts) == len(one) and all(fnmatchcase(part, glob) for part, glob in zip(parts, one, strict=True))
        for one in split
    )


def owned_paths(descriptor: int, owns: Owns, folder: Path, ignored: tuple[str, ...] = ()) -> list[str]:
    """Return all paths in an opened folder, children before their parent. Links are not followed.

    Args:
        descriptor: The opened folder.
        owns: Test for paths that fusion-edge wrote.
        folder: Path of the folder, for messages.
        ignored: Names in the folder to skip.

    Raises:
        ForeignPathError: A path is not owned.
    """
    found: list[str] = []
    _walk(descriptor, "", owns, folder, found, ignored)
    return found


def _walk(descriptor: int, above: str, owns: Owns, folder: Path, found: list[str], ignored: tuple[str, ...]) -> None:
    with os.scandir(descriptor) as listing:
        inside = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing)
    for name, is_folder in inside:
        path = f"{above}{name}{'/' if is_folder else ''}"
        if not above and name in ignored:
            continue
        if not owns(path):
            raise ForeignPathError(folder / path)
        if is_folder:
            below = os.open(name, FOLDER_FLAGS, dir_fd=descriptor)
            try:
                _walk(below, path, owns, folder, found, ())
            finally:
                os.close(below)
        found.append(path)


def delete_paths(descriptor: int, paths: list[str]) -> None:
    """Delete paths that :func:`owned_paths` returned, in their order."""
    for path in paths:
        if path.endswith("/"):
            os.rmdir(path.rstrip("/"), dir_fd=descriptor)
        else:
            os.unlink(path, dir_fd=descriptor)


def remove_folder(descriptor: int, folder: Path, owns: Owns, last: str = "") -> None:
    """Delete an opened folder with its content, the file named ``last`` at the end.

    Raises :class:`ForeignPathError`, and deletes nothing, if it holds a path that is not owned.
    """
    delete_paths(descriptor, sorted(owned_paths(descriptor, owns, folder), key=lambda path: path == last))
    os.rmdir(folder)
