"""Open a bundle, or a checkpoint in the eager interpreter, by its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.errors import FusionError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusion_edge.runtime.cli.model_options import LoadOptions

CHECKPOINT_CONFIG = "config.json"
LIBRARIES = ("torch", "onnx", "huggingface_hub")
"""What reading and running a checkpoint needs."""


@contextmanager
def open_model(folder: Path, **options: Unpack[LoadOptions]) -> Iterator[Fusion]:
    """Open a bundle with ``options`` of :func:`load`, or a checkpoint in torch, in float32 on the CPU.

    Raises :class:`FusionError` as :func:`load`, and for a folder that is neither.
    """
    if (folder / MANIFEST).exists() or not (folder / CHECKPOINT_CONFIG).exists():
        with load(folder, **options) as fusion:
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
