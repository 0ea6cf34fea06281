"""The folder of results: what a run writes there, and what of an earlier run a later one deletes."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from fusion_edge import __version__
from fusion_edge.benchmarks.acceptance.engine import LAYERS_SUFFIX
from fusion_edge.benchmarks.acceptance.plan import PARTS, steps
from fusion_edge.benchmarks.acceptance.runner import log_name
from fusion_edge.benchmarks.acceptance.steps import FAIL, PASS, SKIPPED, StepResult
from fusion_edge.runtime.bundle.json_file import read_json
from fusion_edge.runtime.errors import UsageError

RESULT = "result.json"
SCRATCH = ".scratch-"
"""Start of the name of the folder for bundles. A run that is killed leaves it."""
FILES = (RESULT, f".{RESULT}.*", f"*{LAYERS_SUFFIX}", f".*{LAYERS_SUFFIX}.*")
"""Patterns of the files of a run, but for its logs. Those with a leading dot were not written to the end."""


def result_text(results: Sequence[StepResult], seconds: float) -> str:
    """Return the content of :data:`RESULT`."""
    counts = Counter(result.status for result in results)
    content = {
        "fusion_edge": __version__,
        "seconds": round(seconds),
        "counts": {status: counts[status] for status in (PASS, FAIL, SKIPPED)},
        "steps": [asdict(result) for result in results],
    }
    return json.dumps(content, indent=1) + "\n"


def new_output(folder: Path) -> Path:
    """Make an empty folder in place of an earlier result, and return its path without links.

    Raises :class:`UsageError`, and deletes nothing, if there is anything that a run does not write.
    """
    output = Path(os.path.realpath(folder))  # an archive of a link would hold no files
    if output.exists() and not output.is_dir():
        raise UsageError(f"{folder} is not a folder; choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    earlier = sorted(output.iterdir())
    if earlier and not _is_result(output / RESULT):
        raise UsageError(f"{folder} is not an earlier result of this command; choose another --output.")
    if foreign := next((path.name for path in earlier if not _is_written(path)), None):
        raise UsageError(f"{folder} holds {foreign}, which this command does not write; choose another --output.")
    for path in earlier:
        if _is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
    return output


def _is_result(file: Path) -> bool:
    try:
        content = read_json(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() == json.loads(result_text([], 0)).keys()


def _is_written(path: Path) -> bool:
    if _is_folder(path):
        return path.name.startswith(SCRATCH)
    logs = {log_name(step) for step in steps(PARTS)}
    return path.name in logs or any(fnmatchcase(path.name, pattern) for pattern in FILES)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
