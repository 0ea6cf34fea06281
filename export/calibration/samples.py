"""Calibration samples: those of a JSONL file, or general questions about a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.samples import Sample, check_images, read_lines, samples_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
QUESTIONS = (
    "Describe the image.",
    "What is in front of the camera?",
    "How many objects are there?",
    "What could be in the way?",
)
"""Questions asked in turn about a folder of images."""
FEWEST = 8
"""Minimum number of samples: fewer do not represent the inputs of a linear."""


@dataclass(frozen=True)
class Samples:
    """Samples to calibrate with, and held-out samples to evaluate with."""

    calibrating: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def read_samples(data: Path, calibrating: int, held_out: int) -> Samples:
    """Read the samples of a JSONL file, of the one JSONL file in a folder, or of a folder of images.

    The first ``calibrating`` samples are for calibration, the next ``held_out`` for evaluation. Fewer samples are split
    in proportion. Every image is decoded once.

    Raises :class:`FusionError` for unreadable images, for a file with other content, and for fewer than :data:`FEWEST`
    samples; :class:`UsageError` for several JSONL files.
    """
    file = samples_file(data)
    samples = _images(data) if file is None else read_lines(file)
    if calibrating + held_out < FEWEST:
        raise UsageError(f"--samples and --held-out add up to {calibrating + held_out}; at least {FEWEST} are needed.")
    if len(samples) < FEWEST:
        raise FusionError(f"{data} has {len(samples)} samples; calibration needs at least {FEWEST}, better 144.")
    samples = samples[: calibrating + held_out]
    check_images(data, samples)
    held_back = max(1, len(samples) * held_out // (calibrating + held_out))
    return Samples(tuple(samples[:-held_back]), tuple(samples[-held_back:]))


def _images(folder: Path) -> list[Sample]:
    # Hidden files are not images: macOS writes ._NAME.png beside each NAME.png on other file systems.
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    images = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    return [Sample(path, QUESTIONS[i % len(QUESTIONS)]) for i, path in enumerate(images)]
