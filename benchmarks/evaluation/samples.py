"""Samples with answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.samples import Sample, check_images, read_lines, samples_file


def answered_samples(data: Path, limit: int | None = None) -> list[Sample]:
    """Return the first ``limit`` samples of a JSONL file, or of the one in a folder.

    Raises :class:`FusionError` for a file without samples, a sample without an answer, and unreadable images.
    """
    file = samples_file(data)
    samples = [] if file is None else read_lines(file)[:limit]
    if not samples:
        raise FusionError(
            f'{data} has no samples; expected lines of {{"image": PATH, "question": TEXT, "answer": TEXT}}.'
        )
    for number, sample in enumerate(samples, 1):
        if not (sample.answer or "").strip():
            raise FusionError(f"Sample {number} of {data} has no answer, which an evaluation needs; add it.")
    check_images(data, samples)
    return samples


def check_answers(samples: Sequence[Sample], choices: Sequence[str]) -> None:
    """Raise :class:`UsageError` for a sample whose answer is none of the ``choices``, if there are choices."""
    expected = {choice.strip() for choice in choices}
    for number, sample in enumerate(samples, 1):
        if choices and (sample.answer or "").strip() not in expected:
            raise UsageError(
                f"Sample {number} has the answer {short_repr(sample.answer)}, which is none of the choices; add it to "
                "--choices, or leave out the sample."
            )
