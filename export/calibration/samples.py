"""Calibration samples: images with questions, and optional answers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fusion_edge.export.checkpoint.input_files import open_regular, unique_fields
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.image_files import is_url
from fusion_edge.runtime.images.preprocessing import load_image
from fusion_edge.runtime.prompts.prompt import MARKER_IDS
from fusion_edge.runtime.tokenization.text_encoder import any_of, is_empty

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

LARGEST_FILE = 32 << 20  # bytes of a JSONL file: about 100,000 samples
MOST_NAMED = 10  # unreadable images that an error names


@dataclass(frozen=True)
class Sample:
    """An image with a question."""

    image: Path
    question: str
    answer: str | None = None

    def load(self) -> Image.Image:
        """Read the image. Raises :class:`FusionError` if it cannot be read."""
        return load_image(self.image)


@dataclass(frozen=True)
class Samples:
    """Samples to calibrate with, and held-out samples to evaluate with."""

    calibrating: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def read_samples(data: Path, calibrating: int, held_out: int) -> Samples:
    """Read the samples of a JSONL file, of the one JSONL file in a folder, or of a folder of images.

    The first ``calibrating`` samples are for calibration, the next ``held_out`` for evaluation. Fewer samples are split
    in proportion. A line is ``{"image": PATH, "question": TEXT, "answer": TEXT}``; the path is relative to the file,
    the answer is optional. Every image is decoded once.

    Raises :class:`FusionError` for unreadable images, for a file with other content, and for fewer than :data:`FEWEST`
    samples; :class:`UsageError` for several JSONL files.
    """
    if data.is_dir():
        files = sorted(path for path in data.glob("*.jsonl") if not path.name.startswith("."))
        if len(files) > 1:
            raise UsageError(f"{data} has {len(files)} JSONL files; name the one to calibrate with.")
        samples = _read_lines(files[0]) if files else _images(data)
    elif data.is_file():
        samples = _read_lines(data)
    else:
        raise FusionError(f"{data} does not exist; expected a folder of images or a JSONL file of samples.")
    if calibrating + held_out < FEWEST:
        raise UsageError(f"--samples and --held-out add up to {calibrating + held_out}; at least {FEWEST} are needed.")
    if len(samples) < FEWEST:
        raise FusionError(f"{data} has {len(samples)} samples; calibration needs at least {FEWEST}, better 144.")
    samples = samples[: calibrating + held_out]
    _check_images(data, samples)
    held_back = max(1, len(samples) * held_out // (calibrating + held_out))
    return Samples(tuple(samples[:-held_back]), tuple(samples[-held_back:]))


def _images(folder: Path) -> list[Sample]:
    # Hidden files are not images: macOS writes ._NAME.png beside each NAME.png on other file systems.
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    images = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    return [Sample(path, QUESTIONS[i % len(QUESTIONS)]) for i, path in enumerate(images)]


def _read_lines(file: Path) -> list[Sample]:
    samples = []
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FusionError(f"{file} cannot be read ({error}); expected lines of JSON in UTF-8.") from None
    if len(content) > LARGEST_FILE:
        raise FusionError(f"{file} has more than {LARGEST_FILE} bytes; a few hundred samples are enough.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value = _parse_line(line, f"Line {number} of {file}")
        samples.append(Sample(file.parent / value["image"], value["question"], value.get("answer")))
    return samples


def _parse_line(line: str, where: str) -> dict[str, str]:
    """Return the fields of a sample. Raises :class:`FusionError`, which names ``where``, for any other content."""
    expected = 'expected {"image": PATH, "question": TEXT} and optionally "answer"'
    try:
        value = json.loads(line, object_pairs_hook=unique_fields)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not {"image", "question"} <= set(value) <= {"image", "question", "answer"}:
        raise FusionError(f"{where} is not a sample; {expected}.")
    if not all(isinstance(text, str) for text in value.values()):
        raise FusionError(f"{where} has a value that is not text; {expected}.")
    if is_empty(value["question"], any_of(MARKER_IDS)):
        raise FusionError(f"{where} has an empty question; {expected}.")
    if any("\ud800" <= character <= "\udfff" for text in value.values() for character in text):
        raise FusionError(f"{where} has half of a surrogate pair, which is not valid text; {expected}.")
    if is_url(value["image"]):
        raise FusionError(
            f"{where} has the URL {value['image'][:200]!r} as its image, and URLs are not fetched; download the image "
            "and use the path of the file."
        )
    return value


def _check_images(data: Path, samples: list[Sample]) -> None:
    unreadable: dict[Path, str] = {}
    for image in dict.fromkeys(sample.image for sample in samples):
        try:
            load_image(image)
        except FusionError as error:
            unreadable[image] = str(error)
    if unreadable:
        names = [image.name for image in unreadable][:MOST_NAMED] + ["..."] * (len(unreadable) > MOST_NAMED)
        raise FusionError(
            f"{len(unreadable)} images of {data} cannot be read: {', '.join(names)}. The first: "
            f"{next(iter(unreadable.values()))}"
        )
