"""What the user asks of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

METHODS = ("gptq", "rtn")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class CalibrationOptions:
    """Each field is an option of ``fusion-export`` and explained there."""

    data: Path
    samples: int = 128
    held_out: int = 16
    method: str = "gptq"
    device: str = "cpu"
    largest_drop: float | None = None
    """``--max-accuracy-drop``, percentage points."""
