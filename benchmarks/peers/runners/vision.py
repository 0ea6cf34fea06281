"""Workload of every vision runner: the global crops of an image, then the local crop with a question.

Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fusion_edge.benchmarks.peers.runners.worker import (
    Measurement,
    Settings,
    Workload,
    import_engine,
    option,
    peak,
    resident,
)

IMAGE_SIZE = 384  # pixels, as in runtime/bundle/config.py, which other engines' environments cannot import


@dataclass(frozen=True)
class VisionWorkload(Workload):
    """Sizes of a run."""

    crops: int = option(4, "global crops, in one batch")
    question_tokens: int = option(20, "text tokens of the local crop")


@dataclass(frozen=True)
class VisionFigures:
    """Figures of one run."""

    load_seconds: float
    """Including one untimed run of each kind."""
    global_seconds: float
    """Crops without text."""
    local_seconds: float
    """One crop with a question."""
    image_seconds: float
    """Sum of both."""
    memory: int
    """Resident bytes of the process at the end, mapped file pages included."""
    peak_memory: int
    """Peak resident bytes."""


class Encoder(Protocol):
    """Loaded vision encoder with its projectors (docs/fusion-model.md, section 2). Arrays are float32 numpy arrays."""

    @property
    def settings(self) -> Settings:
        """Options passed to the engine."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of text embeddings and features, D."""
        ...

    def encode_global(self, pixels: Any) -> Any:
        """Encode crops ``[N,3,S,S]`` without text to features ``[N,P,D]``."""
        ...

    def encode_local(self, pixels: Any, text: Any) -> Any:
        """Encode one crop ``[1,3,S,S]`` with a question's embeddings ``[1,T,D]`` to features ``[1,P,D]``."""
        ...


def measure(
    load: Callable[[Path, VisionWorkload, Settings], Encoder], model: Path, work: VisionWorkload, settings: Settings
) -> Measurement:
    """Measure in this process."""
    numpy: Any = import_engine("numpy", "numpy")
    start = time.perf_counter()
    encoder = load(model, work, settings)
    random = numpy.random.default_rng(0)
    pixels = random.uniform(-1, 1, (work.crops, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(numpy.float32)
    text = random.normal(0, 0.02, (1, work.question_tokens, encoder.hidden_size)).astype(numpy.float32)
    encoder.encode_global(pixels)
    encoder.encode_local(pixels[:1], text)
    loaded = time.perf_counter()
    encoder.encode_global(pixels)
    encoded = time.perf_counter()
    encoder.encode_local(pixels[:1], text)
    end = time.perf_counter()
    figures = VisionFigures(
        load_seconds=loaded - start,
        global_seconds=encoded - loaded,
        local_seconds=end - encoded,
        image_seconds=end - loaded,
        memory=resident(),
        peak_memory=peak(),
    )
    return Measurement(figures, encoder.settings)
