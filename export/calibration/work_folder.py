"""Where a calibration keeps what it has finished: a hidden folder beside the output."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion_edge.export.bundle.folder_content import delete_paths, matches, owned_paths, remove_folder
from fusion_edge.export.bundle.folder_lock import locked_folder
from fusion_edge.export.bundle.hidden_folders import hidden_folder
from fusion_edge.export.calibration.activation_cache import replace_text
from fusion_edge.export.calibration.samples import Samples
from fusion_edge.export.planning.plan import ExportPlan

_COMMAND = "command.json"
_FILES = ("*.json", "*.json.part", "*.npy", "states-*")


@contextmanager
def work_folder(output: Path, command: str) -> Iterator[Path]:
    """The folder for ``output``: with what an equal command left in it, else empty. Removed unless an error occurs.

    ``command`` is text that is equal for commands that do the same. Raises :class:`FusionError` while another
    calibration uses the folder, or if it is not ours or holds what calibrations do not write.
    """
    folder = _folder_of(output)
    busy = f"Another calibration for {output} is running; wait for it or choose another output."
    with locked_folder(folder, busy) as descriptor:
        if not (folder / _COMMAND).exists() or (folder / _COMMAND).read_text(encoding="utf-8") != command:
            # The command first, so that what a kill leaves is never taken for its work.
            delete_paths(descriptor, sorted(owned_paths(descriptor, _owns, folder), key=lambda path: path != _COMMAND))
            replace_text(folder / _COMMAND, command)
        yield folder
        (folder / _COMMAND).unlink()
        remove_folder(descriptor, folder, _owns)


def _owns(path: str) -> bool:
    return matches(path, *_FILES)


def folder_bytes(output: Path) -> int:
    """Bytes of what an earlier run left for ``output``."""
    folder = _folder_of(output)
    return sum(file.lstat().st_size for file in folder.iterdir()) if folder.is_dir() else 0


def _folder_of(output: Path) -> Path:
    return hidden_folder(Path(os.path.realpath(output)), "calibration")


def describe(plan: ExportPlan, samples: Samples, settings: dict[str, Any]) -> str:
    """Everything that calibrated weights follow from, as text: files by size and time, for reading all takes long."""
    asked = [*samples.calibrating, *samples.held_out]
    files = [*plan.checkpoint.files, *dict.fromkeys(sample.picture for sample in asked)]
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    facts = {
        "settings": settings,
        "files": stamps,
        "held_out": len(samples.held_out),
        "questions": [(str(sample.picture), sample.question, sample.answer) for sample in asked],
        "target": plan.options.target.name,  # decides how inputs are rounded
        "formats": {name: str(form) for name, form in plan.formats.items()},
        "prequantized": sorted(name for name, linear in plan.linears.items() if linear.prequantized),
        "query_lengths": plan.options.query_lengths,
        "image_tokens": plan.options.image_tokens,
        "tokenizer": hashlib.sha256(plan.small_files["tokenizer.json"]).hexdigest(),
        "model": repr(plan.config),
    }
    return json.dumps(facts, indent=1)
