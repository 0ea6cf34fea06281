"""Steps of the acceptance, what they get, and how they end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
"""What a step measured, as JSON."""
PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


@dataclass(frozen=True)
class Step:
    """A step: one call of a function in a process of its own."""

    name: str
    part: str
    function: str
    """``module:function``. It gets a :class:`Workspace` and :attr:`arguments`, and returns an :class:`Outcome`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """As JSON."""
    needs: tuple[str, ...] = ()
    """Names of steps that must have passed, if they are part of the run."""
    limit: float = 120
    """Seconds after which the process is killed."""


@dataclass(frozen=True)
class Workspace:
    """Files of a run."""

    output: Path
    """Folder to send back."""
    scratch: Path
    """Folder that is deleted after the run."""
    bundle: Path | None
    """Bundle of ``--bundle``."""
    kernels: Path | None
    """Folder of ``--kernels``."""


@dataclass(frozen=True)
class Outcome:
    """What a step found."""

    summary: str
    """The end of one line."""
    figures: Figures = field(default_factory=dict)
    is_failure: bool = False
    """Whether the step fails nevertheless. Its figures are kept, unlike those of a step that raises."""


class SkippedStep(Exception):
    """The machine lacks what a step needs. The message is a sentence with the remedy."""


@dataclass(frozen=True)
class StepResult:
    """How a step ended."""

    name: str
    part: str
    status: str
    """:data:`PASS`, :data:`FAIL` or :data:`SKIPPED`."""
    summary: str
    """Outcome, or the reason why it failed or was skipped."""
    seconds: float
    peak_memory: int
    """Largest resident memory of the process in bytes; 0 if it crashed or did not start."""
    figures: Figures
    log: str | None
    """Name of the log in the folder; None if the step did not start."""
