"""Which shapes the engines of a bundle must take: the ranges of the graphs' symbolic dimensions.

An engine is tuned for the typical shape and reserves memory for the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, MINIMUM_QUESTION, side
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER, sized
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.images.grids import pooling_cells

Ranges = Mapping[str, tuple[int, ...]]
"""Least, typical and largest size by symbolic dimension (``runtime/bundle/graphs.py``)."""
MAXIMUM_QUESTION_TOKENS = 512
"""Text rows of the vision encoder. Its memory grows with them, and a robot's questions are short."""
TYPICAL_QUESTION = 24


@dataclass(frozen=True)
class Limits:
    """What the engines are built for."""

    max_context: int
    """Positions of the KV cache."""
    max_questions: int
    max_question_tokens: int


def limits(manifest: Manifest, max_context: int) -> Limits:
    """What a context leaves room for beside the image tokens."""
    rest = max_context - manifest.image_side**2
    questions = rest // (max(manifest.query_lengths) + MINIMUM_QUESTION)
    return Limits(max_context, max(questions, 1), min(rest, MAXIMUM_QUESTION_TOKENS))


def profiles(manifest: Manifest, built_for: Limits) -> dict[str, list[Ranges]]:
    """The profiles of each graph, by its name. An LLM has two that share its weights: prompts, and one-token steps."""
    return {
        VISION_ENCODER: [
            # One, as TensorRT-RTX would keep the weights once for each of two.
            {"crops": (1, GLOBAL_CROPS, GLOBAL_CROPS), "text": (0, TYPICAL_QUESTION, built_for.max_question_tokens)}
        ],
        ALIGNMENT_DECODER: [_alignment(manifest)],
        LLM: list(_llm(manifest, built_for)),
    }


def _alignment(manifest: Manifest) -> Ranges:
    size, window = 2 * manifest.model.vision.grid, manifest.model.alignment.window_size
    latents = [pooling_cells(size, side(q)).shape for q in manifest.query_lengths]
    context = [pooling_cells(size, window * side(q)).shape for q in manifest.query_lengths]
    return {
        "latents": _range(manifest.query_lengths),
        "side": _range([rows for rows, _ in latents]),
        "latent_rows": _range([cell for _, cell in latents]),
        "context_side": _range([rows for rows, _ in context]),
        "context_rows": _range([cell for _, cell in context]),
    }


def _llm(manifest: Manifest, built_for: Limits) -> Iterator[Ranges]:
    latents = _range(manifest.query_lengths)
    prompt = manifest.image_side**2 + latents[1] + 2 * TYPICAL_QUESTION
    yield {
        "positions": (1, min(prompt, built_for.max_context), built_for.max_context),
        "questions": (1, 1, built_for.max_questions),
        "latents": latents,
    }
    yield {"positions": (1, 1, 1), "questions": (0, 0, 0), "latents": (0, 0, 0)}


def _range(values: Sequence[int]) -> tuple[int, int, int]:
    """The first is the typical one: that of the default query length."""
    return min(values), values[0], max(values)


def shapes(dimensions: Sequence[int | str], ranges: Ranges) -> list[tuple[int, ...]]:
    """Least, typical and largest shape of a tensor."""
    return [sized(dimensions, {name: sizes[i] for name, sizes in ranges.items()}) for i in range(3)]
