"""Read tensors of a checkpoint folder, a few rows at a time.

Files are read with ``preadv``, never memory-mapped: mapped pages would count as the exporter's memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.input_files import unreadable
from fusion_edge.export.checkpoint.safetensors_header import (
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    ITEM_SIZES,
    NUMPY_DTYPES,
    TensorInfo,
    read_header,
)
from fusion_edge.export.checkpoint.weight_files import INDEX_FILE, weight_files
from fusion_edge.export.checkpoint.wrapper_prefixes import strip_wrappers
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.regular_file import open_regular

_CHUNK = 1 << 19  # elements converted at a time: the buffer stays in the processor's cache


class Checkpoint:
    """The tensors of a checkpoint folder. Thread-safe.

    Use it as a context manager: it holds one open file per shard.

    Raises:
        FusionError: The folder has no safetensors file; or an index, shard or header is missing, damaged or
            inconsistent (see :func:`~fusion_edge.export.checkpoint.safetensors_header.read_header`).
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    """Tensors by name, without wrapper prefixes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[Path, int] = {}
        with ExitStack() as opened:
            tensors: dict[str, TensorInfo] = {}
            for file, expected in weight_files(folder).items():
                descriptor = _open(file)
                opened.callback(os.close, descriptor)
                found = read_header(file, descriptor)
                _check_against_index(file, found, expected)
                self._descriptors[file] = descriptor
                for name in sorted(tensors.keys() & found.keys()):
                    raise FusionError(
                        f"Tensor {name} is in both {tensors[name].file} and {file}: remove the file that does not "
                        "belong to the checkpoint."
                    )
                tensors.update(found)
            self.tensors = MappingProxyType(strip_wrappers(tensors))
            self._opened = opened.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading afterwards raises ``KeyError``."""
        self._descriptors.clear()
        self._opened.close()

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(self._descriptors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return a whole float tensor as float32, in its own shape. Raises as :meth:`read_rows`."""
        info = self.tensors[name]
        return self._read(info, 0, math.prod(info.shape)).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` (exclusive) of a float tensor, along its first axis.

        Returns:
            float32 ``[stop - start, *shape[1:]]``, freshly allocated. Uses at most 1 MiB of other memory.

        Raises:
            KeyError: There is no such tensor, or the checkpoint is closed.
            IndexError: The tensor does not have these rows.
            FusionError: The file has shrunk since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{name} has shape {info.shape}; rows {start} to {stop} do not exist")
        row = math.prod(info.shape[1:])
        return self._read(info, start * row, stop * row).reshape(stop - start, *info.shape[1:])

    def read_stored(self, name: str) -> npt.NDArray[Any]:
        """Return a whole tensor in its stored type, but bfloat16 as float32.

        Raises as :meth:`read_rows`, and :class:`FusionError` for 8-bit floats.
        """
        info = self.tensors[name]
        if info.dtype == "F16":
            return self.read(name).astype(np.float16)
        if info.dtype in FLOAT_DTYPES:
            return self.read(name)
        if info.dtype in FLOAT8_DTYPES:
            raise FusionError(
                f"Tensor {name} of {self.folder} has the type {info.dtype}, which is not supported: export the "
                "released bfloat16 checkpoint, or convert the tensor."
            )
        values = np.empty(math.prod(info.shape), NUMPY_DTYPES[info.dtype])
        _read_into(self._descriptors[info.file], values, info, 0)
        return values.reshape(info.shape)

    def _read(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return elements ``start`` to ``stop`` of the flattened tensor."""
        descriptor = self._descriptors[info.file]
        item_size = ITEM_SIZES[info.dtype]
        values = np.empty(stop - start, np.float32)
        if info.dtype == "F32":
            _read_into(descriptor, values, info, start * item_size)
            return values
        buffer = np.empty(min(_CHUNK, values.size), np.uint16)
        for begin in range(0, values.size, _CHUNK):
            widened = values[begin : begin + _CHUNK]
            stored = buffer[: widened.size]
            _read_into(descriptor, stored, info, (start + begin) * item_size)
            if info.dtype == "BF16":  # a bfloat16 is the upper half of a float32
                bits = widened.view(np.uint32)
                bits[:] = stored
                bits <<= 16
            else:
                widened[:] = stored.view(np.float16)
        return values


def _open(file: Path) -> int:
    try:
        return open_regular(file)
    except FileNotFoundError:
        raise FusionError(
            f"The shard {file.name} is missing from {file.parent}: download the complete checkpoint again."
        ) from None
    except OSError as error:
        raise unreadable(file, error) from error


def _read_into(descriptor: int, target: npt.NDArray[Any], info: TensorInfo, offset: int) -> None:
    """Fill ``target`` from ``offset`` bytes into the tensor. A single ``preadv`` may read fewer."""
    remaining = target.view(np.uint8).data
    position = info.offset + offset
    while remaining:
        try:
            count = os.preadv(descriptor, [remaining], position)
        except OSError as error:
            raise unreadable(info.file, error) from error
        if count == 0:
            raise FusionError(
                f"{info.file} ends inside tensor {info.name}: it has shrunk since it was opened. Download it again."
            )
        remaining = remaining[count:]
        position += count


def _check_against_index(file: Path, found: dict[str, TensorInfo], expected: set[str] | None) -> None:
    if expected is None:
        return
    for name in sorted(expected - found.keys()):
        raise FusionError(f"{file} lacks tensor {name}, which {INDEX_FILE} places there: download both files again.")
    for name in sorted(found.keys() - expected):
        raise FusionError(
            f"{file} holds tensor {name}, which {INDEX_FILE} does not place there: download both files again."
        )
