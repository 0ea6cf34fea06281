"""The process of one step: ``python -m fusion_edge.benchmarks.acceptance.worker TASK RESULT``, two JSON files.

The result is written last, so a process without one has crashed.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.acceptance.steps import FAIL, PASS, SKIPPED, Outcome, SkippedStep, Step, Workspace
from fusion_edge.benchmarks.latency.machine.memory import peak
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.output_file import write_whole


def task_text(step: Step, workspace: Workspace) -> str:
    """Return the task of a step as JSON."""
    return json.dumps(
        {"function": step.function, "arguments": step.arguments, "workspace": asdict(workspace)}, default=str
    )


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Run the function of a task, and return status, summary and figures."""
    paths = {name: None if path is None else Path(path) for name, path in task["workspace"].items()}
    module, _, name = task["function"].partition(":")
    try:
        outcome: Outcome = getattr(import_module(module), name)(Workspace(**paths), **task["arguments"])  # type: ignore[arg-type]
    except SkippedStep as reason:
        return {"status": SKIPPED, "summary": str(reason), "figures": {}}
    except FusionError as error:
        traceback.print_exc()
        return {"status": FAIL, "summary": str(error), "figures": {}}
    except Exception as error:  # a defect of the step is its result, too
        traceback.print_exc()
        return {"status": FAIL, "summary": f"{type(error).__name__}: {error}", "figures": {}}
    return {"status": FAIL if outcome.is_failure else PASS, "summary": outcome.summary, "figures": outcome.figures}


def main(task: Path, result: Path) -> None:
    """Run a task and write its result."""
    ended = run_task(json.loads(task.read_text(encoding="utf-8")))
    ended["peak_memory"] = peak()  # ru_maxrss would count the parent, too
    write_whole(result, json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
