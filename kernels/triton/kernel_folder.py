"""A folder of compiled kernels, as ``ahead_of_time.py`` writes it. With it, engines are built without Triton."""

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
class CompiledKernel:
    """A kernel for one GPU."""

    name: str
    """Name of the entry point."""
    ptx: str
    threads: int
    """Threads per block."""
    shared_bytes: int


KernelSource = Callable[[str, str, int, str], CompiledKernel]
"""Function of kernel, architecture (as ``87``), hidden size, and dtype (fp16, bf16 or fp32) that returns the kernel."""


@dataclass(frozen=True)
class KernelEntry:
    """A kernel in the folder."""

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
class KernelIndex:
    """Content of ``kernels.json``."""

    entries: tuple[KernelEntry, ...]


class KernelFolder:
    """A :data:`KernelSource` that reads the kernels of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read the index of ``folder``. Raises :class:`FusionError` if it has none."""
        self._folder = folder
        try:
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._entries = from_json(KernelIndex, content).entries
        except (OSError, ValueError, RecursionError) as error:
            raise FusionError(f"{folder} is not a folder of kernels ({error}); {_remedy(folder)}.") from None

    def __call__(self, kernel: str, architecture: str, width: int, dtype: str) -> CompiledKernel:
        """Return a kernel. Raises :class:`FusionError` if the folder lacks it, or its file has changed."""
        wanted = (kernel, architecture, width, dtype)
        for entry in self._entries:
            if (entry.kernel, entry.architecture, entry.width, entry.dtype) == wanted:
                path = self._folder / Path(entry.file).name
                content = path.read_bytes() if path.is_file() else b""
                if hashlib.sha256(content).hexdigest() != entry.sha256:
                    raise FusionError(f"{path} is missing or has changed; {_remedy(self._folder)}.")
                return CompiledKernel(entry.name, content.decode("ascii"), entry.threads, entry.shared_bytes)
        raise FusionError(
            f"{self._folder} has no {kernel} for sm_{architecture}, width {width} and {dtype}; "
            f"{_remedy(self._folder)} --architecture {architecture} --width {width} --dtype {dtype}."
        )


def write_index(folder: Path, entries: list[KernelEntry]) -> None:
    """Write the index of a folder of PTX files, which :class:`KernelFolder` reads."""
    text = json.dumps(asdict(KernelIndex(tuple(entries))), indent=1) + "\n"
    write_whole(folder / INDEX, text)


def _remedy(folder: Path) -> str:
    return f"make it with: python -m fusion_edge.kernels.triton.ahead_of_time --output {folder}"
