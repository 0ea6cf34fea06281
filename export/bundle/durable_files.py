"""Write files and folders durably, also on file systems that lack a system call."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file. Raises :class:`OSError`, also if the path exists."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, memoryview(content), 0)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: it appears with all of its content or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes at ``offset``. A single ``pwrite`` may write fewer."""
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def reserve(descriptor: int, size: int) -> None:
    """Set a file's size in bytes, and allocate its blocks if the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(descriptor, size)


def flush_file(path: Path) -> None:
    """Flush a file to the disk (fsync), so that a power cut leaves no torn file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk. Does nothing if the file system does not support it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EBADF, errno.EACCES, errno.EPERM):
            raise


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically. Return False if the file system or the C library cannot.

    Raises :class:`OSError`.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))
