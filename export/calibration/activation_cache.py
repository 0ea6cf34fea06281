"""Activation cache: the activations of every sample between two blocks, in a file.

Memory holds one sample at a time. Files are read and written, not mapped: mapped pages count as memory of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusion_edge.export.bundle.durable_files import replace_text

Activations = dict[str, Tensor]
"""Float32 tensors by name."""

_Index = list[dict[str, tuple[int, list[int]]]]
# Offset in bytes and shape, by sample and name.


class ActivationWriter:
    """Appends the activations of one sample after another."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by write_activations)
        self.index: _Index = []

    def append(self, activations: Activations) -> None:
        """Append the next sample's activations."""
        entry = {}
        for name, value in activations.items():
            entry[name] = self._file.tell(), list(value.shape)
            self._file.write(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
        self.index.append(entry)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def write_activations(path: Path) -> Iterator[ActivationWriter]:
    """Open a cache for writing. Its index is written last: the cache is complete once the index exists."""
    writer = ActivationWriter(path)
    try:
        yield writer
    finally:
        writer.close()
    replace_text(_index_of(path), json.dumps(writer.index))


class ActivationReader:
    """Reads a complete cache, by sample number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index: _Index = json.loads(_index_of(path).read_text(encoding="utf-8"))

    def __getitem__(self, sample: int) -> Activations:
        activations = {}
        for name, (offset, shape) in self._index[sample].items():
            count = int(np.prod(shape, dtype=np.int64))
            values = np.fromfile(self._path, np.float32, count, offset=offset)
            activations[name] = torch.from_numpy(values.reshape(shape))
        return activations


def is_complete(path: Path) -> bool:
    """Return whether a cache was written to its end."""
    return _index_of(path).exists()


def delete_activations(path: Path) -> None:
    """Delete a cache, its index first: a killed deletion never leaves a cache that looks complete."""
    _index_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
