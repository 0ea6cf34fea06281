"""Calibration samples: pictures with questions, and answers where they are known."""

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

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
QUESTIONS = (
    "Describe the image.",
    "What is in front of the camera?",
    "How many objects are there?",
    "What could be in the way?",
)
"""Asked in turn where a folder holds pictures alone."""
FEWEST = 8
"""Fewer samples than this say too little about any linear's inputs."""

LARGEST_FILE = 32 << 20  # bytes of a JSONL file: a hundred thousand samples
MOST_NAMED = 10  # unreadable pictures in an error


@dataclass(frozen=True)
class Sample:
    """A picture with a question."""

    picture: Path
    question: str
    answer: str | None = None

    def load(self) -> Image.Image:
        """The picture. Raises :class:`FusionError` if it cannot be read."""
        return load_image(self.picture)


@dataclass(frozen=True)
class Samples:
    """What calibrates, and what is only evaluated."""

    calibrating: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def read_samples(data: Path, calibrating: int, held_out: int) -> Samples:
    """Samples of a JSONL file, of the one in a folder, or of a folder's pictures: the first ones calibrate.

    Where there are fewer than asked for, they are shared out in proportion.

    A line is ``{"image": PATH, "question": TEXT, "answer": TEXT}``, the path relative to the file and the answer
    optional. Every picture is opened once: those that cannot be read are named and counted. Raises
    :class:`FusionError` for those, for a file that holds anything else, and for fewer than :data:`FEWEST` samples.
    """
    if data.is_dir():
        files = sorted(path for path in data.glob("*.jsonl") if not path.name.startswith("."))
        if len(files) > 1:
            raise UsageError(f"{data} holds {len(files)} JSONL files; name the one to calibrate with.")
        samples = _read_lines(files[0]) if files else _pictures(data)
    elif data.is_file():
        samples = _read_lines(data)
    else:
        raise FusionError(f"{data} does not exist; expected a folder of pictures or a JSONL file of samples.")
    if calibrating + held_out < FEWEST:
        raise UsageError(f"--samples and --held-out add up to {calibrating + held_out}; at least {FEWEST} are needed.")
    if len(samples) < FEWEST:
        raise FusionError(f"{data} holds {len(samples)} samples; calibration needs at least {FEWEST}, better 144.")
    samples = samples[: calibrating + held_out]
    _check_pictures(data, samples)
    kept_back = max(1, len(samples) * held_out // (calibrating + held_out))
    return Samples(tuple(samples[:-kept_back]), tuple(samples[-kept_back:]))


def _pictures(folder: Path) -> list[Sample]:
    # Hidden files are no pictures: a Mac writes ._NAME.png beside each NAME.png on other file systems.
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = sorted(path for path in paths if path.suffix.lower() in PICTURES)
    return [Sample(path, QUESTIONS[i % len(QUESTIONS)]) for i, path in enumerate(pictures)]


def _read_lines(file: Path) -> list[Sample]:
    expected = 'expected {"image": PATH, "question": TEXT} and optionally "answer"'
    samples = []
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FusionError(f"{file} cannot be read ({error}); expected lines of JSON in UTF-8.") from None
    if len(content) > LARGEST_FILE:
        raise FusionError(f"{file} has more than {LARGEST_FILE} bytes; keep some hundreds of samples in it.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=unique_fields)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not {"image", "question"} <= set(value) <= {"image", "question", "answer"}:
            raise FusionError(f"Line {number} of {file} is no sample; {expected}.")
        if not all(isinstance(text, str) for text in value.values()):
            raise FusionError(f"Line {number} of {file} holds something that is no text; {expected}.")
        if is_empty(value["question"], any_of(MARKER_IDS)):
            raise FusionError(f"Line {number} of {file} has an empty question; {expected}.")
        if any("\ud800" <= character <= "\udfff" for text in value.values() for character in text):
            raise FusionError(f"Line {number} of {file} holds half a surrogate pair, which is no text; {expected}.")
        if is_url(value["image"]):
            raise FusionError(
                f"Line {number} of {file} has the address {value['image'][:200]!r} as its image, and addresses are not "
                "fetched; download it and give the file's path."
            )
        samples.append(Sample(file.parent / value["image"], value["question"], value.get("answer")))
    return samples


def _check_pictures(data: Path, samples: list[Sample]) -> None:
    unreadable: dict[Path, str] = {}
    for picture in dict.fromkeys(sample.picture for sample in samples):
        try:
            load_image(picture)
        except FusionError as error:
            unreadable[picture] = str(error)
    if unreadable:
        names = [picture.name for picture in unreadable][:MOST_NAMED] + ["..."] * (len(unreadable) > MOST_NAMED)
        raise FusionError(
            f"{len(unreadable)} pictures of {data} cannot be read: {', '.join(names)}. The first: "
            f"{next(iter(unreadable.values()))}"
        )
