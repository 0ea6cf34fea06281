"""Writing a planned bundle: weights stream through in blocks of rows, the folder appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.graph_builder import PlannedTensor
from fusion_edge.export.plan import DataFile, ExportPlan
from fusion_edge.export.weights import CheckpointWeights
from fusion_edge.quant.packing import quantize
from fusion_edge.runtime import bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.progress import Progress

BLOCK_ELEMENTS = 1 << 19  # float32 values of one block of rows: 2 MB, small enough for a core's cache
DISK_MARGIN_BYTES = 16 << 20


def write_bundle(plan: ExportPlan, output: Path, force: bool) -> bundle.Manifest:
    """Write the bundle and rename it into place.

    Raises :class:`FusionError` if the output exists and ``force`` is off, if the disk is too small, if another
    export is writing the same output, or if a weight is not finite. Leaves nothing behind then.
    """
    output = Path(os.path.realpath(output))  # a link to a bundle stays a link
    if not output.parent.is_dir():
        raise FusionError(f"{output.parent} is not a folder; create it first or choose another output.")
    with _partial_folder(output) as folder:
        _check_output(output, force)
        _check_disk(plan, output)
        for name, content in plan.small_files.items():
            (folder / name).write_bytes(content)
        weights = CheckpointWeights(plan.checkpoint, plan.parameters)
        with Progress("Quantizing", _total_elements(plan), "M weights") as progress:
            for file in plan.data_files:
                _write_data(folder / file.name, file, weights, progress)
        names = [*plan.small_files, *(file.name for file in plan.data_files)]
        sizes = {name: (folder / name).stat().st_size for name in names}
        with Progress("Checksums", sum(sizes.values())) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(lambda name: bundle.digest(folder / name, progress.advance), names)
            entries = tuple(bundle.FileEntry(n, sizes[n], d) for n, d in zip(names, digests, strict=True))
        manifest = plan.manifest(entries)
        (folder / bundle.MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            _flush(path)
    return manifest


def _flush(path: Path) -> None:
    """Have a file or folder on the disk before the rename: a power cut must not leave a torn file in a bundle."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Weights ----------------------------------------------------------------------------------------------------


def _total_elements(plan: ExportPlan) -> int:
    return sum(plan.parameters[name].size for file in plan.data_files for name in _by_parameter(file, plan.parameters))


def _by_parameter(file: DataFile, known: Iterable[str]) -> dict[str, list[PlannedTensor]]:
    """The tensors of a data file that come from each parameter."""
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in file.tensors:
        if tensor.parameter in known:
            groups.setdefault(tensor.parameter, []).append(tensor)
    return groups


def _write_data(path: Path, file: DataFile, weights: CheckpointWeights, progress: Progress) -> None:
    """Fill a data file block by block on every core; each block's place is known, so order does not matter."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        if file.size:
            os.posix_fallocate(descriptor, 0, file.size)
        for tensor in file.tensors:
            if tensor.content is not None:
                _write_at(descriptor, tensor.content, tensor.offset)

        def write(block: tuple[list[PlannedTensor], int, int]) -> None:
            tensors, start, stop = block
            rows = weights.rows(tensors[0].parameter, start, stop)
            for tensor, content in zip(tensors, _encode(rows, tensors), strict=True):
                row_bytes = tensor.nbytes // tensor.shape[0]
                _write_at(descriptor, content, tensor.offset + start * row_bytes)
            progress.advance(rows.size)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(write, _blocks(file, weights)):
                pass
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, content: npt.NDArray[Any], offset: int) -> None:
    """All bytes of an array; one system call may write fewer than asked."""
    remaining = np.ascontiguousarray(content).data.cast("B")
    while remaining:
        count = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[count:], offset + count


def _blocks(file: DataFile, weights: CheckpointWeights) -> Iterator[tuple[list[PlannedTensor], int, int]]:
    """Each parameter's tensors (values first) with a range of rows."""
    for name, tensors in _by_parameter(file, weights.parameters).items():
        parameter = weights.parameters[name]
        rows = parameter.shape[0]
        step = max(1, BLOCK_ELEMENTS * rows // parameter.size)
        for start in range(0, rows, step):
            yield tensors, start, min(start + step, rows)


def _encode(rows: npt.NDArray[np.float32], tensors: list[PlannedTensor]) -> tuple[npt.NDArray[Any], ...]:
    """A block of float32 rows in the form of its tensors: values, and scales if there are any."""
    form = tensors[0].format
    if form.is_quantized:
        return quantize(rows, form)
    return (np.ascontiguousarray(rows, dtype=tensors[0].dtype),)


# The folder -------------------------------------------------------------------------------------------------


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    is_bundle = (output / bundle.MANIFEST).is_file()
    if not force:
        raise FusionError(f"{output} exists; choose another output or pass --force to replace it.")
    if not is_bundle and not (output.is_dir() and not any(output.iterdir())):
        raise FusionError(f"{output} exists and is no bundle, so --force does not replace it; choose another output.")


def _check_disk(plan: ExportPlan, output: Path) -> None:
    needed, free = plan.bundle_bytes + DISK_MARGIN_BYTES, shutil.disk_usage(output.parent).free
    if free < needed:
        raise FusionError(
            f"The disk of {output.parent} has {free / 1e9:.2f} GB free; the bundle needs {needed / 1e9:.2f} GB. "
            "Free some space or choose another output."
        )


@contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output``, renamed to it at the end and removed on any error.

    What a killed export left is removed by the next one; the lock tells it from one that is still running.
    """
    folder = output.parent / f".{output.name}.partial"
    replaced = output.parent / f".{output.name}.replaced"
    try:
        with _locked(folder, output):
            _put_back(replaced, output)  # an export was killed between the two renames below
            for left in folder.iterdir():
                left.unlink()
            yield folder
            try:
                if output.exists():
                    output.rename(replaced)
                folder.rename(output)
            finally:
                _put_back(replaced, output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FusionError(f"The disk of {output.parent} is full; free some space and export again.") from None
        raise FusionError(f"Cannot write {output}: {error.strerror}.") from None


def _put_back(replaced: Path, output: Path) -> None:
    """The replaced bundle returns if nothing has taken its place, and goes if something has."""
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``folder``, made if absent, which an error removes."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have renamed or removed what was opened here a moment ago.
            locked = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            locked = False
        if not locked:
            raise FusionError(f"Another export is writing {output}; wait for it or choose another output.")
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)
