"""Strict, bounded-memory reading of safetensors checkpoints.

Files are read with ``preadv`` and never memory-mapped: mapped pages would count as the exporter's memory.

Format (safetensors 0.4): 8 bytes little-endian header length, a JSON header of
``name -> {dtype, shape, data_offsets}``, then the tensors' bytes, row-major and little-endian, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.source import LARGEST_JSON, LONGEST_NAME, disguise, open_regular, unique_fields
from fusion_edge.export.checkpoint.weight_files import INDEX_FILE, weight_files
from fusion_edge.export.checkpoint.wrapped_names import without_wrappers
from fusion_edge.runtime.errors import FusionError

_CHUNK = 1 << 19  # elements widened at a time: the buffer stays in the processor's cache
FLOATS = ("BF16", "F16", "F32")
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # never read
_STORED = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
"""numpy's names of types: quantized checkpoints have some, and buffers that the model does not read."""
_ITEM_SIZES = (
    {"BF16": 2, "F16": 2, "F32": 4}
    | dict.fromkeys(_FLOAT8, 1)
    | {name: np.dtype(stored).itemsize for name, stored in _STORED.items()}
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str
    """As safetensors names it: one of :data:`FLOATS`, another that numpy has, or a float of 8 bits."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of ``file``."""
    nbytes: int


class Checkpoint:
    """The tensors of a checkpoint folder, floats read row by row as float32; safe to read from several threads.

    Use it as a context manager: it holds one open file per shard.

    Raises:
        FusionError: The folder has no safetensors, or an index, shard or header is missing, damaged or
            inconsistent (see :func:`read_header`).
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    """By name, without wrappers (:func:`fusion_edge.export.checkpoint.wrapped_names.without_wrappers`)."""

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
                        f"{name} is in both {tensors[name].file} and {file}: remove the one that does not belong there."
                    )
                tensors.update(found)
            self.tensors = MappingProxyType(without_wrappers(tensors))
            self._opened = opened.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading afterwards raises ``KeyError``."""
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
        """The whole tensor as float32, in its own shape. Raises as :meth:`read_rows`."""
        info = self.tensors[name]
        return self._read(info, 0, math.prod(info.shape)).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start`` to ``stop`` (exclusive) along the first axis.

        Returns:
            float32 ``[stop - start, *shape[1:]]``, freshly allocated; besides it at most 1 MiB is used.

        Raises:
            KeyError: No such tensor (or the checkpoint is closed).
            IndexError: Rows that the tensor does not have.
            FusionError: The file has shrunk since it was opened or cannot be read.
        """
        info = self.tensors[name]
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{name} has shape {info.shape}, rows {start} to {stop} were asked for")
        row = math.prod(info.shape[1:])
        return self._read(info, start * row, stop * row).reshape(stop - start, *info.shape[1:])

    def read_stored(self, name: str) -> npt.NDArray[Any]:
        """The whole tensor in the type that it is stored in, but bfloat16 as float32.

        Raises as :meth:`read_rows`, and :class:`FusionError` for floats of 8 bits.
        """
        info = self.tensors[name]
        if info.dtype == "F16":
            return self.read(name).astype(np.float16)
        if info.dtype in FLOATS:
            return self.read(name)
        if info.dtype in _FLOAT8:
            raise FusionError(
                f"Tensor {name} of {self.folder} has the type {info.dtype}, which is not supported: export the "
                "released bfloat16 checkpoint, or convert the tensor."
            )
        values = np.empty(math.prod(info.shape), _STORED[info.dtype])
        _read_into(self._descriptors[info.file], values, info, 0)
        return values.reshape(info.shape)

    def _read(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Elements ``start`` to ``stop`` of the flattened tensor."""
        descriptor = self._descriptors[info.file]
        item_size = _ITEM_SIZES[info.dtype]
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


def read_header(file: Path, descriptor: int) -> dict[str, TensorInfo]:
    """Read and validate the header of one safetensors file.

    Raises:
        FusionError: The file is truncated or of another kind, its header is no such header, a tensor appears
            twice, has an unsupported type, a size that its shape contradicts, or bytes that overlap, leave a gap
            or lie outside of the file.
    """
    file_size = os.fstat(descriptor).st_size
    length = int.from_bytes(_read_bytes(file, descriptor, 8, 0), "little")
    if not 0 < length <= min(file_size - 8, LARGEST_JSON) and (what := disguise(_read_bytes(file, descriptor, 64, 0))):
        raise FusionError(f"{file} is {what}.")
    if not 0 < length <= file_size - 8:
        raise FusionError(
            f"{file} is truncated or no safetensors file: its first 8 bytes announce a header of {length} "
            f"bytes, but the file has {file_size}; download it again."
        )
    if length > LARGEST_JSON:
        raise _corrupt(file, f"its {length} bytes are over the limit of {LARGEST_JSON}")
    header = _parse_header(file, _read_bytes(file, descriptor, length, 8))
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(file, tensors, 8 + length, file_size)
    return tensors


def _open(file: Path) -> int:
    try:
        return open_regular(file)
    except FileNotFoundError:
        raise FusionError(
            f"The shard {file.name} is missing from {file.parent}: download the checkpoint again, completely."
        ) from None
    except OSError as error:
        raise _unreadable(file, error) from error


def _read_bytes(file: Path, descriptor: int, count: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, count, offset)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> FusionError:
    return FusionError(f"{file} cannot be read ({error.strerror}): check its permissions and the disk.")


def _read_into(descriptor: int, target: npt.NDArray[Any], info: TensorInfo, offset: int) -> None:
    """Fill ``target`` from ``offset`` bytes into the tensor; one system call may return less than asked."""
    remaining = target.view(np.uint8).data
    position = info.offset + offset
    while remaining:
        try:
            count = os.preadv(descriptor, [remaining], position)
        except OSError as error:
            raise _unreadable(info.file, error) from error
        if count == 0:
            raise FusionError(
                f"{info.file} ends inside the tensor {info.name}, it has shrunk since it was opened: download it again."
            )
        remaining = remaining[count:]
        position += count


def _check_against_index(file: Path, found: dict[str, TensorInfo], expected: set[str] | None) -> None:
    if expected is None:
        return
    for name in sorted(expected - found.keys()):
        raise FusionError(f"{file} lacks {name}, which {INDEX_FILE} places there: download both files again.")
    for name in sorted(found.keys() - expected):
        raise FusionError(f"{file} holds {name}, which {INDEX_FILE} does not place there: download both files again.")


def _corrupt(file: Path, what: str) -> FusionError:
    return FusionError(f"{file} has a corrupt safetensors header, {what}: download it again.")


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"it is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "it is no JSON object")
    return header


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Validate one entry of a header, but for its place among the others."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise _corrupt(file, f"{name[:LONGEST_NAME]!r} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(file, f"the entry of {name} should have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise FusionError(
            f"{name} in {file} has the type {dtype}, supported are {', '.join(_ITEM_SIZES)}: "
            "use the released bfloat16 checkpoint, or convert the tensor."
        )
    if not all(_is_sizes(values) for values in (shape, offsets)) or len(offsets) != 2:
        raise _corrupt(file, f"shape {shape} or data_offsets {offsets} of {name} are no sizes")
    begin, end = offsets
    nbytes = math.prod(shape) * _ITEM_SIZES[dtype]
    if end - begin != nbytes:
        raise _corrupt(file, f"{name} takes {end - begin} bytes, but {dtype} of shape {shape} needs {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _is_sizes(values: Any) -> bool:
    """At most eight 63-bit numbers: no model has more, and their product can still be printed."""
    if not isinstance(values, list) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(file: Path, tensors: Mapping[str, TensorInfo], data_start: int, file_size: int) -> None:
    """The tensors must fill the file from ``data_start`` to its end, without overlaps or gaps."""
    end = data_start
    # The second key puts an empty tensor before the one that starts at the same byte.
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            kind = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise _corrupt(file, f"{info.name} {kind}")
        end += info.nbytes
        if end > file_size:
            raise FusionError(
                f"{file} is truncated: the tensor {info.name} ends at byte {end}, the file has {file_size}; "
                "download it again."
            )
    if end != file_size:
        raise _corrupt(file, f"{file_size - end} bytes at the end of the file belong to no tensor")
