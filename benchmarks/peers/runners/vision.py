"""What every runner of a vision encoder does: the crops of one image, then the local crop with a question.

Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fusion_edge.benchmarks.peers.runners.worker import Measured, peak, peer, resident

IMAGE_SIZE = 384  # pixels a side of a crop, as in runtime/bundle/config.py, which peers' environments cannot import


@dataclass(frozen=True)
class Workload:
    """What every runner does."""

    crops: int = 4
    """Crops without text, in one batch."""
    question_tokens: int = 20
    """Text rows of the local crop."""
    threads: int = 2


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    load_seconds: float
    """Up to the end of one untimed run of either kind."""
    global_seconds: float
    """The crops without text."""
    local_seconds: float
    """One crop with a question."""
    image_seconds: float
    """Both: all that one image and one question take."""
    memory: int
    """Resident bytes of the process at the end, pages mapped from files included."""
    peak_memory: int
    """The most that was ever resident."""


class Encoder(Protocol):
    """A loaded vision encoder with its projectors (FUSION.md, section 2). Arrays are numpy's, float32."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the engine was told."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of text embeddings and features, D."""
        ...

    def encode_global(self, pixels: Any) -> Any:
        """Crops ``[N,3,S,S]`` without text -> features ``[N,P,D]``."""
        ...

    def encode_local(self, pixels: Any, text: Any) -> Any:
        """One crop ``[1,3,S,S]`` and a question's embeddings ``[1,T,D]`` -> ``[1,P,D]``."""
        ...


def measure(load: Callable[[Path, Workload], Encoder], model: Path, work: Workload) -> Measured:
    """Measure in this process."""
    numpy: Any = peer("numpy", "numpy")
    start = time.perf_counter()
    encoder = load(model, work)
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
    figures = Figures(
        load_seconds=loaded - start,
        global_seconds=encoded - loaded,
        local_seconds=end - encoded,
        image_seconds=end - loaded,
        memory=resident(),
        peak_memory=peak(),
    )
    return Measured(figures, encoder.settings)
