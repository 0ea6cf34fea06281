"""What is left of every sample between two blocks, in a file: memory holds one sample's at a time.

Read and written, not mapped: the pages of a mapped file count as memory of the process.
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

Activations = dict[str, Tensor]
"""Named float32 tensors."""

_Index = list[dict[str, tuple[int, list[int]]]]
# For every sample and name: offset in bytes, shape.


class ActivationWriter:
    """Appends one sample's state after the other."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by writing)
        self.index: _Index = []

    def append(self, state: Activations) -> None:
        """The next sample's."""
        entry = {}
        for name, value in state.items():
            entry[name] = self._file.tell(), list(value.shape)
            self._file.write(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
        self.index.append(entry)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def writing(path: Path) -> Iterator[ActivationWriter]:
    """States for ``path``, complete once its index is there: that is the last thing written."""
    writer = ActivationWriter(path)
    try:
        yield writer
    finally:
        writer.close()
    replace_text(_index_of(path), json.dumps(writer.index))


class ActivationReader:
    """What was written to ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index: _Index = json.loads(_index_of(path).read_text(encoding="utf-8"))

    def __getitem__(self, sample: int) -> Activations:
        state = {}
        for name, (offset, shape) in self._index[sample].items():
            count = int(np.prod(shape, dtype=np.int64))
            values = np.fromfile(self._path, np.float32, count, offset=offset)
            state[name] = torch.from_numpy(values.reshape(shape))
        return state


def are_complete(path: Path) -> bool:
    """Whether the states of ``path`` were written to their end."""
    return _index_of(path).exists()


def remove(path: Path) -> None:
    """Delete states; the index first, so that what is left of a kill is never taken for complete."""
    _index_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
