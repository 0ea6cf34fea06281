"""Samples: questions about images, with optional answers, in a JSONL file.

``fusion-export --calibrate`` and ``fusion-eval`` read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fusion_edge.runtime.bundle.json_file import object_of_pairs
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.images.image_files import is_url
from fusion_edge.runtime.images.preprocessing import load_image
from fusion_edge.runtime.prompts.prompt import MARKER_IDS
from fusion_edge.runtime.system.regular_file import open_regular
from fusion_edge.runtime.tokenization.text_encoder import any_of, is_empty

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


def samples_file(data: Path) -> Path | None:
    """Return ``data`` if it is a file, or the one JSONL file in the folder ``data``; None if the folder has none.

    Raises :class:`UsageError` for several JSONL files, :class:`FusionError` if ``data`` does not exist.
    """
    if data.is_file():
        return data
    if not data.is_dir():
        raise FusionError(f"{data} does not exist; expected a JSONL file of samples or its folder.")
    files = sorted(path for path in data.glob("*.jsonl") if not path.name.startswith("."))
    if len(files) > 1:
        raise UsageError(f"{data} has {len(files)} JSONL files; name the one to read.")
    return files[0] if files else None


def read_lines(file: Path) -> list[Sample]:
    """Read a JSONL file of samples.

    A line is ``{"image": PATH, "question": TEXT, "answer": TEXT}``; the path is relative to the file, the answer is
    optional. Raises :class:`FusionError` for other content.
    """
    samples = []
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FusionError(f"{file} cannot be read ({error}); expected lines of JSON in UTF-8.") from None
    if len(content) > LARGEST_FILE:
        raise FusionError(f"{file} has more than {LARGEST_FILE} bytes; pass fewer samples.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value = _parse_line(line, f"Line {number} of {file}")
        samples.append(Sample(file.parent / value["image"], value["question"], value.get("answer")))
    return samples


def check_images(data: Path, samples: Sequence[Sample]) -> None:
    """Decode every image once. Raise :class:`FusionError` that names the unreadable ones."""
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


def _parse_line(line: str, where: str) -> dict[str, str]:
    """Return the fields of a sample. Raises :class:`FusionError`, which names ``where``, for any other content."""
    expected = 'expected {"image": PATH, "question": TEXT} and optionally "answer"'
    try:
        value = json.loads(line, object_pairs_hook=object_of_pairs)
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
