"""Open a bundle, or a checkpoint in the eager interpreter, by its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.errors import FusionError

CHECKPOINT_CONFIG = "config.json"
LIBRARIES = ("torch", "onnx", "huggingface_hub")
"""What reading and running a checkpoint needs."""


@contextmanager
def open_model(folder: Path, device: str, threads: int | None) -> Iterator[Fusion]:
    """Open a bundle on ``device`` with ``threads``, or a checkpoint in torch, in float32 on the CPU.

    Raises :class:`FusionError` as :func:`load`, and for a folder that is neither.
    """
    if (folder / MANIFEST).exists() or not (folder / CHECKPOINT_CONFIG).exists():
        with load(folder, device=device, threads=threads) as fusion:
            yield fusion
        return
    if missing := [library for library in LIBRARIES if find_spec(library) is None]:
        raise FusionError(
            f"{folder} is a checkpoint, which needs {', '.join(missing)}; run pip install '.[calibrate]' in a clone of "
            "fusion-edge, or pass a bundle."
        )
    from fusion_edge.export.reference.eager_backend import open_checkpoint  # torch, only for a checkpoint

    with open_checkpoint(folder) as fusion:
        yield fusion
