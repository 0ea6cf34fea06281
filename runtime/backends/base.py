"""What a backend does: run the three graphs and keep the KV cache. One file a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageAlignment:
    """What the LLM needs of an image, whatever is asked about it."""

    latents: Floats
    """``[q,D]``: rows of the prompt."""
    keys: Any
    """``[layers,q,9,D]``, in the backend's own form and on its device."""
    values: Any
    """As ``keys``."""


class Backend(Protocol):
    """Shapes as in ``runtime/graphs.py``; arrays in and out are float32 whatever the graphs compute in."""

    name: str

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Floats:
        """Vision encoder: ``[N,3,S,S]``, ``[N,T,D]``, ``[N,T]`` -> ``[N,P,D]``."""
        ...

    def align(self, features: Floats, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        """Alignment decoder, for the four global crops' features ``[4,P,D]``."""
        ...

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
    ) -> Floats:
        """Start a sequence of at most ``capacity`` positions with ``[L,D]``: logits ``[V]`` of its last one."""
        ...

    def decode(self, embedding: Floats) -> Floats:
        """Append one token's embedding ``[D]``: logits ``[V]``, valid until the next call."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
