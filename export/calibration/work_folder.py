"""Work folder of a calibration: a hidden folder beside the output that keeps finished blocks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion_edge.export.bundle.durable_files import replace_text
from fusion_edge.export.bundle.folder_content import delete_paths, matches, owned_paths, remove_folder
from fusion_edge.export.bundle.folder_lock import locked_folder
from fusion_edge.export.bundle.hidden_folders import hidden_folder
from fusion_edge.export.calibration.samples import Samples
from fusion_edge.export.planning.plan import ExportPlan

_COMMAND = "command.json"
_FILES = ("*.json", "*.json.part", "*.npy", "activations-*")


@contextmanager
def work_folder(output: Path, command: str) -> Iterator[Path]:
    """Open the work folder for ``output``. Keeps the files of an equal command. Deletes it unless an error occurs.

    Commands with the same result have the same ``command`` (:func:`command_text`). Raises :class:`FusionError` while
    another calibration uses the folder, or if the folder belongs to another user or holds other files.
    """
    folder = _folder_of(output)
    busy = f"Another calibration for {output} is running; wait for it or choose another output."
    with locked_folder(folder, busy) as descriptor:
        if not (folder / _COMMAND).exists() or (folder / _COMMAND).read_text(encoding="utf-8") != command:
            # Delete the command first: a killed deletion never leaves files that look like those of the command.
            delete_paths(descriptor, sorted(owned_paths(descriptor, _owns, folder), key=lambda path: path != _COMMAND))
            replace_text(folder / _COMMAND, command)
        yield folder
        (folder / _COMMAND).unlink()
        remove_folder(descriptor, folder, _owns)


def _owns(path: str) -> bool:
    return matches(path, *_FILES)


def folder_bytes(output: Path) -> int:
    """Return the size of the work folder that an earlier run left for ``output``."""
    folder = _folder_of(output)
    return sum(file.lstat().st_size for file in folder.iterdir()) if folder.is_dir() else 0


def _folder_of(output: Path) -> Path:
    return hidden_folder(Path(os.path.realpath(output)), "calibration")


def command_text(plan: ExportPlan, samples: Samples, settings: dict[str, Any]) -> str:
    """Return everything that calibrated weights depend on, as JSON. Files are compared by size and time only."""
    every = [*samples.calibrating, *samples.held_out]
    files = [*plan.checkpoint.files, *dict.fromkeys(sample.image for sample in every)]
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    facts = {
        "settings": settings,
        "files": stamps,
        "held_out": len(samples.held_out),
        "questions": [(str(sample.image), sample.question, sample.answer) for sample in every],
        "target": plan.options.target.name,  # decides how activations are quantized
        "formats": {name: str(fmt) for name, fmt in plan.formats.items()},
        "prequantized": sorted(name for name, linear in plan.linears.items() if linear.prequantized),
        "query_lengths": plan.options.query_lengths,
        "image_tokens": plan.options.image_tokens,
        "tokenizer": hashlib.sha256(plan.small_files["tokenizer.json"]).hexdigest(),
        "model": repr(plan.config),
    }
    return json.dumps(facts, indent=1)
