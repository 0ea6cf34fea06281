"""Choose TensorRT's optimization profiles: ranges of the graphs' symbolic dimensions.

An engine is tuned for the typical shape and reserves memory for the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusion_edge.export.planning.traffic import decode_windows
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, MINIMUM_QUESTION
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER, cache_slots, sized
from fusion_edge.runtime.bundle.image_memory import longest_prefix
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.images.grids import alignment_cells

DimensionRanges = Mapping[str, tuple[int, ...]]
"""Minimum, typical and maximum size by symbolic dimension (``runtime/bundle/graphs.py``)."""
MAXIMUM_QUESTION_TOKENS = 512
"""Text tokens of the vision encoder. Its memory grows with them, and a robot's questions are short."""
TYPICAL_QUESTION = 24
SHORT_PROMPT = 32, 256
"""Fewest and most tokens of a profile of its own for prompts behind a scene: latents and question."""


@dataclass(frozen=True)
class EngineLimits:
    """Largest inputs of the engines."""

    max_context: int
    """Tokens in the KV cache."""
    max_questions: int
    """Questions in a prompt."""
    max_question_tokens: int
    """Text tokens of the vision encoder."""


def engine_limits(manifest: Manifest, max_context: int) -> EngineLimits:
    """Return the limits for a context of ``max_context`` tokens, image tokens included."""
    rest = max_context - manifest.image_side**2
    questions = rest // (max(manifest.query_lengths) + MINIMUM_QUESTION)
    return EngineLimits(max_context, max(questions, 1), min(rest, MAXIMUM_QUESTION_TOKENS))


def optimization_profiles(manifest: Manifest, limits: EngineLimits) -> dict[str, list[DimensionRanges]]:
    """Return the profiles of each graph by name.

    Those of the LLM share weights: short prompts if whole ones are longer, all prompts, then decode by window.
    """
    return {
        VISION_ENCODER: [
            # One profile: TensorRT-RTX would store the weights once per profile.
            {"crops": (1, GLOBAL_CROPS, GLOBAL_CROPS), "text": (0, TYPICAL_QUESTION, limits.max_question_tokens)}
        ],
        ALIGNMENT_DECODER: [_alignment(manifest)],
        LLM: list(_llm(manifest, limits)),
    }


def _alignment(manifest: Manifest) -> DimensionRanges:
    size, window = 2 * manifest.model.vision.grid, manifest.model.alignment.window_size
    cells = [alignment_cells(size, length, window) for length in manifest.query_lengths]
    latents, context = [latent.shape for latent, _ in cells], [rows.shape for _, rows in cells]
    return {
        "latents": _range(manifest.query_lengths),
        "side": _range([rows for rows, _ in latents]),
        "latent_rows": _range([cell for _, cell in latents]),
        "context_side": _range([rows for rows, _ in context]),
        "context_rows": _range([cell for _, cell in context]),
    }


def _llm(manifest: Manifest, limits: EngineLimits) -> Iterator[DimensionRanges]:
    _, latents, most_latents = _range(manifest.query_lengths)
    short = latents + 2 * TYPICAL_QUESTION
    whole = min(manifest.image_side**2 + short, limits.max_context)
    shared = {
        "questions": (0, 1, limits.max_questions),  # a prefix has no question, and so no latents
        "latents": (0, latents, most_latents),
    }
    before = whole - short  # tokens of a scene
    fewest, most = SHORT_PROMPT
    if fewest <= short <= most < whole:
        yield {"positions": (fewest, short, most), **shared, **_read_by_prompt(manifest, limits, whole, before)}
    yield {"positions": (1, whole, limits.max_context), **shared, **_read_by_prompt(manifest, limits, whole, 0)}
    nothing = {"questions": _only(0), "latents": _only(0)}
    for size in decode_windows(limits.max_context, manifest.has_per_token_scales):
        yield {"positions": _only(1), **nothing, **_read_by_step(manifest, limits, size)}


def _read_by_prompt(manifest: Manifest, limits: EngineLimits, whole: int, before: int) -> DimensionRanges:
    """Return the ranges of the KV cache that a prompt reads: with its own tokens ``whole``, or those ``before`` it."""
    if not manifest.has_per_token_scales:
        return {"slots": (1, whole, limits.max_context)}
    return {"slots": _only(0), "prefix": (0, before, longest_prefix(manifest, limits.max_context))}


def _read_by_step(manifest: Manifest, limits: EngineLimits, size: int) -> DimensionRanges:
    """Return the ranges of the KV cache that a decode step reads in a window of ``size`` tokens."""
    if not manifest.has_per_token_scales:
        return {"slots": _only(size)}
    is_whole = size == limits.max_context
    return {"slots": _only(cache_slots(manifest.cache_specs, size) if is_whole else size), "prefix": _only(0)}


def _only(size: int) -> tuple[int, ...]:
    return size, size, size


def _range(values: Sequence[int]) -> tuple[int, int, int]:
    """Return minimum, typical and maximum. The first value, of the default query length, is the typical one."""
    return min(values), values[0], max(values)


def profile_shapes(dimensions: Sequence[int | str], ranges: DimensionRanges) -> list[tuple[int, ...]]:
    """Return the minimum, typical and maximum shape of a tensor."""
    return [sized(dimensions, {name: sizes[i] for name, sizes in ranges.items()}) for i in range(3)]
