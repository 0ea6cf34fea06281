"""Parse and validate the header of a safetensors file.

Format (safetensors 0.4): 8 bytes header length, little-endian; a JSON header ``name -> {dtype, shape, data_offsets}``;
then the tensors' bytes, row-major and little-endian, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion_edge.export.checkpoint.input_files import (
    LARGEST_JSON,
    LONGEST_NAME,
    identify_format,
    unique_fields,
    unreadable,
)
from fusion_edge.runtime.errors import FusionError

FLOAT_DTYPES = ("BF16", "F16", "F32")
FLOAT8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Types that headers may have and that are never read."""
NUMPY_DTYPES = {
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
"""NumPy dtypes of prequantized tensors and of buffers that the model ignores."""
ITEM_SIZES = (
    {"BF16": 2, "F16": 2, "F32": 4}
    | dict.fromkeys(FLOAT8_DTYPES, 1)
    | {name: np.dtype(stored).itemsize for name, stored in NUMPY_DTYPES.items()}
)
"""Bytes per element of every supported type."""


@dataclass(frozen=True)
class TensorInfo:
    """Location and type of a tensor."""

    name: str
    dtype: str
    """Safetensors type name, a key of :data:`ITEM_SIZES`."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of ``file``."""
    nbytes: int


def read_header(file: Path, descriptor: int) -> dict[str, TensorInfo]:
    """Read and validate the header of a safetensors file; return its tensors by name.

    Raises :class:`FusionError` for a file that is truncated or of another format, a malformed header, a duplicate
    tensor, an unsupported type, a size that contradicts the shape, and bytes that overlap, leave a gap or lie outside
    the file.
    """
    file_size = os.fstat(descriptor).st_size
    length = int.from_bytes(_read_bytes(file, descriptor, 8, 0), "little")
    if not 0 < length <= min(file_size - 8, LARGEST_JSON) and (
        what := identify_format(_read_bytes(file, descriptor, 64, 0))
    ):
        raise FusionError(f"{file} is {what}.")
    if not 0 < length <= file_size - 8:
        raise FusionError(
            f"{file} is truncated or not a safetensors file: a header of {length} bytes does not fit "
            f"into {file_size} bytes. Download it again."
        )
    if length > LARGEST_JSON:
        raise _corrupt(file, f"its length is {length} bytes, the limit {LARGEST_JSON}")
    header = _parse_header(file, _read_bytes(file, descriptor, length, 8))
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_offsets(file, tensors, 8 + length, file_size)
    return tensors


def _read_bytes(file: Path, descriptor: int, count: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, count, offset)
    except OSError as error:
        raise unreadable(file, error) from error


def _corrupt(file: Path, what: str) -> FusionError:
    return FusionError(f"{file} has a corrupt safetensors header: {what}. Download it again.")


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"it is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "it is not a JSON object")
    return header


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Validate one header entry, except for its place among the others."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise _corrupt(file, f"{name[:LONGEST_NAME]!r} is not a valid tensor name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(file, f"the entry of {name} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise FusionError(
            f"Tensor {name} in {file} has the type {dtype}; supported are {', '.join(ITEM_SIZES)}. Use the released "
            "bfloat16 checkpoint, or convert the tensor."
        )
    if not all(_is_sizes(values) for values in (shape, offsets)) or len(offsets) != 2:
        raise _corrupt(file, f"shape {shape} or data_offsets {offsets} of {name} are not sizes")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if end - begin != nbytes:
        raise _corrupt(file, f"{name} takes {end - begin} bytes, but {dtype} of shape {shape} needs {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _is_sizes(values: Any) -> bool:
    """Return whether ``values`` are at most eight 63-bit sizes. No model has more, and messages can print them."""
    if not isinstance(values, list) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_offsets(file: Path, tensors: Mapping[str, TensorInfo], data_start: int, file_size: int) -> None:
    """Raise :class:`FusionError` unless the tensors fill the file from ``data_start``, without overlaps or gaps."""
    end = data_start
    # The second key puts an empty tensor before the one that starts at the same byte.
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            kind = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise _corrupt(file, f"{info.name} {kind}")
        end += info.nbytes
        if end > file_size:
            raise FusionError(
                f"{file} is truncated: tensor {info.name} ends at byte {end}, the file at {file_size}. "
                "Download it again."
            )
    if end != file_size:
        raise _corrupt(file, f"{file_size - end} bytes at the end of the file belong to no tensor")
