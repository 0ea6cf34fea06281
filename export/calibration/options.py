"""Options of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

METHODS = ("gptq", "rtn")
DEVICES = ("cpu", "cuda")
SENSITIVITY_SAMPLES = 4


@dataclass(frozen=True)
class CalibrationOptions:
    """Each field is an option of ``fusion-export``, documented there."""

    data: Path
    samples: int = 128
    held_out: int = 16
    method: str = "gptq"
    device: str = "cpu"
    largest_drop: float | None = None
    """``--max-accuracy-drop``: percentage points."""
    budget: int | None = None
    """``--budget``: bytes of the bundle."""
    bits: float | None = None
    """``--bits``: mean bits per weight of the linears that can have 4."""
    sensitivity_samples: int | None = None
    """None: :data:`SENSITIVITY_SAMPLES`."""

    @property
    def has_budget(self) -> bool:
        """Whether 4-bit linears may be promoted to 8 bits."""
        return self.budget is not None or self.bits is not None
