"""Where a calibration keeps what it has finished: a hidden folder beside the output."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion_edge.export.folder_lock import locked
from fusion_edge.export.plan import ExportPlan
from fusion_edge.quant.calibration.samples import Samples
from fusion_edge.quant.calibration.states import replace_text

_COMMAND = "command.json"


@contextmanager
def work_folder(output: Path, command: str) -> Iterator[Path]:
    """The folder for ``output``: with what an equal command left in it, else empty. Removed unless an error occurs.

    ``command`` is text that is equal for commands that do the same. Raises :class:`FusionError` while another
    calibration uses the folder.
    """
    folder = _folder_of(output)
    with locked(folder, f"Another calibration for {output} is running; wait for it or choose another output."):
        if not (folder / _COMMAND).exists() or (folder / _COMMAND).read_text(encoding="utf-8") != command:
            _clear(folder)
            replace_text(folder / _COMMAND, command)
        yield folder
        _clear(folder)
        folder.rmdir()


def _clear(folder: Path) -> None:
    """Delete everything; the command first, so that what a kill leaves is never taken for its work."""
    (folder / _COMMAND).unlink(missing_ok=True)
    for left in folder.iterdir():
        left.unlink()


def folder_bytes(output: Path) -> int:
    """Bytes of what an earlier run left for ``output``."""
    folder = _folder_of(output)
    return sum(file.stat().st_size for file in folder.iterdir()) if folder.exists() else 0


def _folder_of(output: Path) -> Path:
    output = Path(os.path.realpath(output))
    return output.parent / f".{output.name}.calibration"


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
        "target": plan.options.target,  # decides how inputs are rounded
        "formats": {name: str(form) for name, form in plan.formats.items()},
        "packed": sorted(plan.packed),
        "query_lengths": plan.options.query_lengths,
        "image_tokens": plan.options.image_tokens,
        "tokenizer": hashlib.sha256(plan.small_files["tokenizer.json"]).hexdigest(),
        "model": repr(plan.config),
    }
    return json.dumps(facts, indent=1)
