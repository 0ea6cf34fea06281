"""Time the stages of a backend with random inputs: global crops, alignment, local crop, prefill, decode steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion_edge.benchmarks.latency.roofline import cache_bytes, weight_bytes
from fusion_edge.benchmarks.latency.statistics import timed
from fusion_edge.runtime.backends.base import Backend
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.images.grids import alignment_cells

QUESTION_TOKENS = 24
REPEATS = 5


@dataclass(frozen=True)
class StageMedians:
    """Median seconds of :data:`REPEATS` runs; loading runs once."""

    name: str
    load: float
    encode_global: float
    alignment: float
    encode_local: float
    prefill: float
    decode_step: float
    memory: int
    """GPU bytes in use beyond those before loading; 0 on a CPU."""

    @property
    def ttft(self) -> float:
        """Time to first token of a first question, without preprocessing."""
        return self.encode_global + self.alignment + self.encode_local + self.prefill


def measure(
    backend: Backend, manifest: Manifest, loaded: float, steps: int, used_memory: Callable[[], int]
) -> StageMedians:
    """Time one image and one question, stage by stage, each once untimed before.

    ``loaded`` are the seconds of the load; ``used_memory`` returns the GPU bytes in use beyond those before it.
    """
    config, rng = manifest.model, np.random.default_rng(0)
    width, latents = config.language.hidden_size, manifest.query_lengths[0]

    def floats(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    pixels, words = floats(GLOBAL_CROPS, 3, IMAGE_SIZE, IMAGE_SIZE), floats(1, QUESTION_TOKENS, width)
    nothing, all_words = floats(GLOBAL_CROPS, 0, width), np.ones((1, QUESTION_TOKENS), np.bool_)
    tables = alignment_cells(2 * config.vision.grid, latents, config.alignment.window_size)
    features = backend.encode(pixels, nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_))
    image = backend.align(features, *tables)
    rows = floats(prompt_tokens(manifest), width)
    places = np.arange(len(rows) - latents - QUESTION_TOKENS, len(rows) - QUESTION_TOKENS)[None]
    last, capacity = np.array([len(rows) - 1]), min(backend.max_context, len(rows) + steps)

    def prefill() -> None:
        backend.prefill(rows, image, places, last, capacity)

    prefill()
    memory = used_memory()
    prefilled = median_seconds(prefill)
    times = [timed(lambda: backend.decode(rows[0])) for _ in range(capacity - len(rows))]
    return StageMedians(
        name=backend.name,
        load=loaded,
        encode_global=median_seconds(
            lambda: np.asarray(backend.encode(pixels, nothing, np.zeros((GLOBAL_CROPS, 0), np.bool_)))
        ),
        alignment=median_seconds(lambda: backend.align(features, *tables)),
        encode_local=median_seconds(lambda: np.asarray(backend.encode(pixels[:1], words, all_words))),
        prefill=prefilled,
        decode_step=statistics.median(times),
        memory=memory,
    )


def decode_step_behind(backend: Backend, manifest: Manifest, length: int, steps: int) -> float:
    """Return the median seconds of ``steps`` decode steps behind a random prompt of ``length`` tokens."""
    config, rng = manifest.model, np.random.default_rng(0)
    latents, width = manifest.query_lengths[0], config.language.hidden_size
    features = rng.normal(0, 0.5, (GLOBAL_CROPS, config.vision.patches, width)).astype(np.float32)
    tables = alignment_cells(2 * config.vision.grid, latents, config.alignment.window_size)
    image = backend.align(features, *tables)
    rows = rng.normal(0, 0.5, (length, width)).astype(np.float32)
    places = np.arange(length - latents - QUESTION_TOKENS, length - QUESTION_TOKENS)[None]
    backend.prefill(rows, image, places, np.array([length - 1]), length + 1 + steps)
    backend.decode(rows[0])
    return statistics.median(timed(lambda: backend.decode(rows[0])) for _ in range(steps))


def prompt_tokens(manifest: Manifest) -> int:
    """Return the tokens of a prompt with a short question: image tokens, latents and text."""
    return manifest.image_side**2 + manifest.query_lengths[0] + 2 * QUESTION_TOKENS


def step_bytes(manifest: Manifest, cached_tokens: int | None = None) -> int:
    """Return the bytes that a decode step reads: LLM weights and KV cache, by default that of a typical prompt."""
    if cached_tokens is None:
        cached_tokens = prompt_tokens(manifest)
    return weight_bytes(manifest) + cache_bytes(manifest, cached_tokens)


def median_seconds(action: Callable[[], object]) -> float:
    """Return the median seconds of :data:`REPEATS` runs."""
    return statistics.median(timed(action) for _ in range(REPEATS))
