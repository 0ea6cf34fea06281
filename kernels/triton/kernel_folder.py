"""A folder of compiled kernels, as ``ahead_of_time.py`` writes it: a device builds engines without Triton."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_edge.runtime.bundle.schema import from_json
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.output_file import write_whole

INDEX = "kernels.json"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU."""

    name: str
    """Of the entry point."""
    ptx: str
    threads: int
    """Of a block."""
    shared_bytes: int


Compile = Callable[[str, str, int, str], Compiled]
"""A kernel's name, an architecture such as ``87``, a hidden size and fp16, bf16 or fp32 -> the kernel."""


@dataclass(frozen=True)
class Entry:
    """One kernel in the folder."""

    kernel: str
    architecture: str
    width: int
    dtype: str
    file: str
    sha256: str
    name: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Index:
    """The content of ``kernels.json``."""

    entries: tuple[Entry, ...]


class KernelFolder:
    """Reads what :func:`write_index` indexed; a :data:`Compile`."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`FusionError` if it is no such folder."""
        self._folder = folder
        try:
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._entries = from_json(Index, content).entries
        except (OSError, ValueError, RecursionError) as error:
            raise FusionError(f"{folder} is no folder of kernels ({error}); {_make(folder)}.") from None

    def __call__(self, kernel: str, architecture: str, width: int, dtype: str) -> Compiled:
        """Raises :class:`FusionError` if the folder has no such kernel, or it has been altered."""
        wanted = (kernel, architecture, width, dtype)
        for entry in self._entries:
            if (entry.kernel, entry.architecture, entry.width, entry.dtype) == wanted:
                path = self._folder / Path(entry.file).name
                content = path.read_bytes() if path.is_file() else b""
                if hashlib.sha256(content).hexdigest() != entry.sha256:
                    raise FusionError(f"{path} is missing or has been altered; {_make(self._folder)}.")
                return Compiled(entry.name, content.decode("ascii"), entry.threads, entry.shared_bytes)
        raise FusionError(
            f"{self._folder} has no {kernel} for sm_{architecture}, width {width} and {dtype}; "
            f"{_make(self._folder)} --architecture {architecture} --width {width} --dtype {dtype}."
        )


def write_index(folder: Path, entries: list[Entry]) -> None:
    """Make a folder of PTX files one that :class:`KernelFolder` reads."""
    text = json.dumps(asdict(Index(tuple(entries))), indent=1) + "\n"
    write_whole(folder / INDEX, text)


def _make(folder: Path) -> str:
    return f"make it with: python -m fusion_edge.kernels.triton.ahead_of_time --output {folder}"
