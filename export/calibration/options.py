"""What the user asks of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

METHODS = ("gptq", "rtn")
DEVICES = ("cpu", "cuda")
SENSITIVITY_SAMPLES = 4


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
    budget: int | None = None
    """``--budget``, bytes of the bundle."""
    bits: float | None = None
    """``--bits``, mean of the weights that could have 4."""
    sensitivity_samples: int | None = None
    """None: :data:`SENSITIVITY_SAMPLES`."""

    @property
    def is_mixed(self) -> bool:
        """Whether some linears may get 8 bits instead of 4."""
        return self.budget is not None or self.bits is not None
