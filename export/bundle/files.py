"""Writing files so that they are on the disk, on file systems that lack some of what others have."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file. Raises :class:`OSError`, also if something is there."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, memoryview(content), 0)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes; one system call may write fewer than asked."""
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and the disk's blocks for it where the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(descriptor, size)


def flush_file(path: Path) -> None:
    """Have a file on the disk: a power cut must not leave a torn one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can: network and FUSE file systems may not."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EBADF, errno.EACCES, errno.EPERM):
            raise


_HERE = -100  # AT_FDCWD: paths are not relative to an opened folder
_EXCHANGE = 2  # RENAME_EXCHANGE


def exchange(one: Path, other: Path) -> bool:
    """Have two folders take each other's place at once; False if the file system or the C library cannot.

    Raises :class:`OSError`.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))
