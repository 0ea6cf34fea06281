"""Options of a calibration. Each field is an option of ``fusion-export``."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from fusion_edge.export.planning.arguments import option
from fusion_edge.runtime.cli.options import byte_count, positive_integer

METHODS = ("gptq", "rtn")
DEVICES = ("cpu", "cuda")
SENSITIVITY_SAMPLES = 4
CALIBRATION = "calibration"
"""Group of options in ``--help``."""


def _number(text: str) -> float:
    """argparse type of a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 1.5")
    return number


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of a calibration, resolved to their defaults."""

    data: Path
    """JSONL file or folder of images: ``--calibrate``."""
    samples: int = option(
        "--samples",
        "number of samples to calibrate with (default: {default})",
        group=CALIBRATION,
        default=128,
        type=positive_integer,
        metavar="N",
    )
    held_out: int = option(
        "--held-out",
        "number of other samples, which compare the bundle with the float model (default: {default})",
        group=CALIBRATION,
        default=16,
        type=positive_integer,
        metavar="N",
    )
    method: str = option(
        "--method",
        "gptq, or rtn: round to nearest and only measure (default: {default})",
        group=CALIBRATION,
        default="gptq",
        choices=METHODS,
    )
    device: str = option(
        "--device", "device to calibrate on (default: {default})", group=CALIBRATION, default="cpu", choices=DEVICES
    )
    largest_drop: float | None = option(
        "--max-accuracy-drop",
        "fail (exit code 6) if accuracy on the held-out samples drops by more percentage points",
        group=CALIBRATION,
        type=_number,
        metavar="POINTS",
    )
    budget: int | None = option(
        "--budget",
        "allocate 8 bits to the most sensitive 4-bit weights, up to a bundle of this size, e.g. 2.9GB",
        group=CALIBRATION,
        type=byte_count,
        metavar="SIZE",
        exclusive="bit allocation",
    )
    bits: float | None = option(
        "--bits",
        "like --budget, up to this mean number of bits per weight, scales included, e.g. 4.5",
        group=CALIBRATION,
        type=_number,
        metavar="BITS",
        exclusive="bit allocation",
    )
    sensitivity_samples: int | None = option(
        "--sensitivity-samples",
        f"number of samples to measure sensitivity on; time grows with it (default: {SENSITIVITY_SAMPLES})",
        group=CALIBRATION,
        type=positive_integer,
        metavar="N",
    )

    @property
    def has_budget(self) -> bool:
        """Whether 4-bit linears may be promoted to 8 bits."""
        return self.budget is not None or self.bits is not None
