"""Lock a folder, so that one process at a time writes it."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from fusion_edge.runtime.errors import FusionError

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags to open folders with. Links are never followed."""
_REMEDY = "delete it or choose another output."
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)


@contextmanager
def locked_folder(folder: Path, busy: str, is_new: bool = False) -> Iterator[int]:
    """Lock ``folder`` for this process and yield its descriptor. A missing folder is created.

    Args:
        folder: Folder to lock.
        busy: Error message if another process holds the lock.
        is_new: Whether an existing folder counts as locked.

    Raises:
        FusionError: The folder is locked, is a link, is not a folder, or belongs to another user.
        OSError: The folder cannot be created or opened.
    """
    is_created = False
    try:
        try:
            folder.mkdir()
            is_created = True
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
        if is_created:
            with suppress(OSError):
                folder.rmdir()
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_hidden_folder(folder: Path) -> None:
    """Raise :class:`FusionError` if a link or a file has the path of a hidden folder."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        kind = "a link" if folder.is_symlink() else "not a folder"
        raise FusionError(f"{folder} is {kind}; expected nothing or a folder of fusion-edge there: {_REMEDY}")


def _open(folder: Path, busy: str) -> int:
    check_hidden_folder(folder)
    try:
        descriptor = os.open(folder, FOLDER_FLAGS)
    except (FileNotFoundError, NotADirectoryError):  # its holder has just renamed or removed it
        raise FusionError(busy) from None
    # Some file systems have one owner for everything: then the parent's owner is accepted too.
    if os.fstat(descriptor).st_uid not in (os.geteuid(), os.stat(folder.parent).st_uid):
        os.close(descriptor)
        raise FusionError(f"{folder} belongs to another user; expected nothing or a folder of yours: {_REMEDY}")
    return descriptor


def _lock(descriptor: int, folder: Path) -> bool:
    """Lock an opened folder. Return False if another process holds it; warn if the file system has no locks."""
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
    sys.stderr.write(f"warning: The file system of {folder} has no locks; do not run another command on it.\n")


def is_at(descriptor: int, folder: Path) -> bool:
    """Return whether an opened folder still has the path ``folder``."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(folder, follow_symlinks=False))
    return False
