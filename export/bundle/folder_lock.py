"""Folders that commands work in: held by one process at a time, and emptied of nothing but what commands write."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from fusion_edge.runtime.errors import FusionError

Owns = Callable[[str], bool]
"""Whether commands write what has this path, relative to a folder; folders' paths end with a slash."""

OPENED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""How folders are opened, links never."""
_REMEDY = "delete it or choose another output."
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)


@contextmanager
def locked(folder: Path, busy: str, is_new: bool = False) -> Iterator[int]:
    """Hold ``folder``, made if absent, for this process alone; its descriptor.

    Raises :class:`FusionError`: ``busy`` if it is held, or is there though it must be new (``is_new``); with its name
    if it is a link, no folder, or another user's.
    """
    is_made = False
    try:
        try:
            folder.mkdir()
            is_made = True
        except FileExistsError:
            if is_new:
                raise FusionError(busy) from None
        descriptor = _open(folder, busy)
        try:
            if not _lock(descriptor, folder) or not is_at(descriptor, folder):
                raise FusionError(busy)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError:
        if is_made:
            with suppress(OSError):
                folder.rmdir()
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def refuse_other(folder: Path) -> None:
    """Raise :class:`FusionError` if there is something in a hidden folder's place that is none, such as a link."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        kind = "a link" if folder.is_symlink() else "no folder"
        raise FusionError(f"{folder} is {kind}; expected nothing or a folder of fusion-edge there: {_REMEDY}")


def _open(folder: Path, busy: str) -> int:
    refuse_other(folder)
    try:
        descriptor = os.open(folder, OPENED)
    except (FileNotFoundError, NotADirectoryError):  # who held it has renamed or removed it a moment ago
        raise FusionError(busy) from None
    # Where a file system has one owner for all it holds, that is the owner of the folder above, too.
    if os.fstat(descriptor).st_uid not in (os.geteuid(), os.stat(folder.parent).st_uid):
        os.close(descriptor)
        raise FusionError(f"{folder} belongs to another user; expected nothing or a folder of yours: {_REMEDY}")
    return descriptor


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether nobody else holds the folder, as far as the file system can tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn(folder.parent)
    return True


@cache
def _warn(folder: Path) -> None:
    sys.stderr.write(f"warning: The file system of {folder} has no locks; let nothing else write there meanwhile.\n")


def is_at(descriptor: int, folder: Path) -> bool:
    """Whether an opened folder still has the path that it was opened with."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(folder, follow_symlinks=False))
    return False


# What is inside -------------------------------------------------------------------------------------------------


def matches(path: str, *patterns: str) -> bool:
    """Whether a relative path matches a pattern: ``*`` stands for anything but a slash."""
    parts = path.split("/")
    split = [pattern.split("/") for pattern in patterns]
    return any(
        len(parts) == len(one) and all(fnmatchcase(part, glob) for part, glob in zip(parts, one, strict=True))
        for one in split
    )


def entries(descriptor: int, owns: Owns, folder: Path, ignored: tuple[str, ...] = ()) -> list[str]:
    """All paths in an opened folder, relative to it and a folder's content before it; links are not followed.

    Raises :class:`Foreign` for the first that commands do not write. ``ignored`` are names at the top.
    """
    found: list[str] = []
    _walk(descriptor, "", owns, folder, found, ignored)
    return found


class Foreign(FusionError):
    """Something in a folder that no command wrote there."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} was not written by fusion-edge, and is not deleted: move it elsewhere or choose another output."
        )
        self.path = path


def _walk(descriptor: int, above: str, owns: Owns, folder: Path, found: list[str], ignored: tuple[str, ...]) -> None:
    with os.scandir(descriptor) as listing:
        inside = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing)
    for name, is_folder in inside:
        path = f"{above}{name}{'/' if is_folder else ''}"
        if not above and name in ignored:
            continue
        if not owns(path):
            raise Foreign(folder / path)
        if is_folder:
            below = os.open(name, OPENED, dir_fd=descriptor)
            try:
                _walk(below, path, owns, folder, found, ())
            finally:
                os.close(below)
        found.append(path)


def delete(descriptor: int, paths: list[str]) -> None:
    """Delete what :func:`entries` found, in an opened folder."""
    for path in paths:
        if path.endswith("/"):
            os.rmdir(path.rstrip("/"), dir_fd=descriptor)
        else:
            os.unlink(path, dir_fd=descriptor)


def remove(descriptor: int, folder: Path, owns: Owns, last: str = "") -> None:
    """Delete an opened folder with what commands write there, the file named ``last`` at the end.

    Raises :class:`Foreign`, and deletes nothing, if there is anything else.
    """
    delete(descriptor, sorted(entries(descriptor, owns, folder), key=lambda path: path == last))
    os.rmdir(folder)
