"""Write a folder atomically: it appears complete or not at all.

Files are written into a hidden partial folder beside the output. At the end the two are swapped, or the partial folder
is renamed. A mount point cannot be renamed: there the partial folder is inside, and its files are moved up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fusion_edge.export.bundle.durable_files import exchange, flush_folder, write_file
from fusion_edge.export.bundle.folder_content import (
    REPLACED_MANIFEST,
    FolderContent,
    ForeignPathError,
    delete_paths,
    owned_paths,
    remove_folder,
)
from fusion_edge.export.bundle.folder_lock import FOLDER_FLAGS, is_at, locked_folder
from fusion_edge.export.bundle.hidden_folders import hidden_folder, hidden_names, hidden_parent
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system import signals


@contextmanager
def atomic_folder(output: Path, content: FolderContent, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a partial folder that becomes ``output`` at the end. An error or a signal removes it.

    Remains of a killed process are cleaned up first.

    Args:
        output: Folder to create or replace.
        content: What the command writes and may delete.
        check: Raises if ``output`` may not be replaced. Called before and after writing.

    Raises:
        FusionError: Another process is writing ``output``; it or a hidden folder holds foreign files; or the disk
            is full or fails.
    """
    with _locked_partial(output, content) as (folder, descriptor):
        check()
        yield folder
        with signals.held():
            check()
            if not is_at(descriptor, folder):
                raise FusionError(_busy(output, content))
            if folder.parent == output:
                _move_files(folder, output, content)
            else:
                _rename(folder, output, content)


@contextmanager
def locked_output(output: Path, content: FolderContent) -> Iterator[None]:
    """Let no other process write ``output``, to change a file of it or delete it.

    Raises :class:`FusionError` if another process is writing it, or the disk fails.
    """
    with _locked_partial(output, content):
        yield


def delete_output(output: Path, content: FolderContent) -> None:
    """Delete what the command wrote into a locked ``output``, the manifest first: nothing reads the rest without it.

    Files of others stay, and the folder with them.
    """
    owns = content.owned(output / content.manifest)
    with signals.held():
        descriptor = os.open(output, FOLDER_FLAGS)
        try:
            os.unlink(content.manifest, dir_fd=descriptor)
            with suppress(ForeignPathError):
                remove_folder(descriptor, output, owns)
        finally:
            os.close(descriptor)


@contextmanager
def _locked_partial(output: Path, content: FolderContent) -> Iterator[tuple[Path, int]]:
    """Yield a new partial folder, locked, and its descriptor. It is removed at the end unless it has been renamed."""
    folder, busy = hidden_folder(output, "partial"), _busy(output, content)
    try:
        if os.path.lexists(folder):
            _recover_partial(folder, output, content, busy)
        with ExitStack() as stack:
            with signals.held():
                descriptor = stack.enter_context(locked_folder(folder, busy, is_new=True))
                stack.callback(_discard, descriptor, folder, content)
            _recover_replaced(output, content, busy)
            yield folder, descriptor
    except OSError as error:
        raise FusionError(_message(error, output, content.command)) from None


def _busy(output: Path, content: FolderContent) -> str:
    return f"Another {content.command} is writing {output}; wait for it or choose another output."


def _message(error: OSError, output: Path, command: str) -> str:
    place = hidden_parent(output)
    if error.errno == errno.ENOSPC:
        return f"The disk of {place} is full; free some space and {command} again."
    if error.errno == errno.EDQUOT:
        return f"The disk quota of {place} is used up; free some space and {command} again."
    if error.errno == errno.EFBIG:
        return f"The file system of {place} is too small for a file (FAT32: at most 4 GB); choose another output."
    if error.errno in (errno.EBUSY, errno.EXDEV):
        return f"Cannot write {output}, which is in use or a mount point; choose an output inside it."
    return f"Cannot write {output} ({error.strerror}); choose another output."


def _discard(descriptor: int, folder: Path, content: FolderContent) -> None:
    """Remove the partial folder unless it has become the output. Raise nothing: an earlier error matters more."""
    with signals.held(), suppress(OSError, FusionError):
        if is_at(descriptor, folder) and not _is_moving(folder, content):
            remove_folder(descriptor, folder, content.is_partial)


def _is_moving(folder: Path, content: FolderContent) -> bool:
    """Return whether the files of a complete partial folder are being moved into a mount point."""
    return os.path.lexists(folder / REPLACED_MANIFEST) and os.path.lexists(folder / content.manifest)


def _recover_partial(folder: Path, output: Path, content: FolderContent, busy: str) -> None:
    """Remove the partial folder of a killed process. Finish moving its files first, if that has begun."""
    with signals.held(), locked_folder(folder, busy) as descriptor:
        if _is_moving(folder, content):
            _move_files(folder, output, content)
        remove_folder(descriptor, folder, content.is_partial)


# Replace by renaming ----------------------------------------------------------------------------------------------


def _recover_replaced(output: Path, content: FolderContent, busy: str) -> None:
    """Restore what a killed process was replacing, or remove it if there is a new output."""
    replaced = hidden_folder(output, "replaced")
    if not os.path.lexists(replaced):
        return
    owns = content.owned(replaced / content.manifest)
    with signals.held(), locked_folder(replaced, busy) as descriptor:
        if owned_paths(descriptor, owns, replaced) and not os.path.lexists(output):
            os.rename(replaced, output)
        else:
            remove_folder(descriptor, replaced, owns, content.manifest)


def _rename(folder: Path, output: Path, content: FolderContent) -> None:
    """Rename the complete partial folder to the output, and remove what the output held."""
    replaced, owns = hidden_folder(output, "replaced"), content.owned(output / content.manifest)
    if not os.path.lexists(output) or not os.listdir(output):
        os.rename(folder, output)
        flush_folder(output.parent)
        return
    old = os.open(output, FOLDER_FLAGS)
    try:
        owned_paths(old, owns, output)
        try:
            replaced = _swap(folder, output, replaced)
        except OSError as error:
            if error.errno != errno.EXDEV or not os.path.lexists(output / content.manifest):
                raise
            _move_files(folder, output, content)  # a container image's folders cannot be renamed, their files can
            return
        flush_folder(output.parent)
        remove_folder(old, replaced, owns, content.manifest)
    finally:
        os.close(old)


def _swap(folder: Path, output: Path, replaced: Path) -> Path:
    """Put ``folder`` in the output's place. Return where the old content is now."""
    if exchange(folder, output):  # atomic: the output exists at any time
        return folder
    os.rename(output, replaced)
    try:
        os.rename(folder, output)
    except BaseException:
        os.rename(replaced, output)
        raise
    return replaced


# Replace by moving files ------------------------------------------------------------------------------------------


def _move_files(folder: Path, output: Path, content: FolderContent) -> None:
    """Move the files of the complete partial folder into the output. Meanwhile the output has no manifest.

    Running it again after a kill finishes the move.
    """
    current, new, replaced = output / content.manifest, folder / content.manifest, folder / REPLACED_MANIFEST
    old = content.owned(current if os.path.lexists(current) else replaced)
    written = content.written_with(new)
    place = os.open(output, FOLDER_FLAGS)
    try:
        inside = owned_paths(place, lambda path: old(path) or written(path), output, hidden_names(output))
        if os.path.lexists(current):
            os.rename(current, replaced)
        elif not os.path.lexists(replaced):
            write_file(replaced, b"")
        delete_paths(place, [path for path in inside if not written(path)])
    finally:
        os.close(place)
    for name in os.listdir(folder):
        if name not in (content.manifest, REPLACED_MANIFEST):
            os.rename(folder / name, output / name)
    flush_folder(output)
    os.rename(new, current)
    flush_folder(output)
    os.unlink(replaced)
