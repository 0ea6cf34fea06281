"""What a backend does: run the three graphs and keep the KV cache. One file a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.errors import FusionError

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
    """Shapes as in ``runtime/bundle/graphs.py``; arrays in and out are float32 whatever the graphs compute in.
    One call at a time, by any thread.

    ``tests/support/backend_contract.py`` checks what is promised here.
    """

    name: str
    max_context: int
    """Positions that a sequence may have: less than the bundle's where engines were built for less."""

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> npt.ArrayLike:
        """Vision encoder: ``[N,3,S,S]``, ``[N,T,D]``, ``[N,T]`` -> ``[N,P,D]``.

        The features are in the backend's own form and on its device; ``numpy.asarray`` brings them to the host.
        """
        ...

    def align(self, features: Any, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        """Alignment decoder, for what ``encode`` gave for the four global crops, or ``[4,P,D]`` on the host."""
        ...

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
    ) -> Floats:
        """Start a sequence of at most ``capacity`` positions with ``[L,D]``: logits ``[V]`` of its last one.

        The sequence before is forgotten. The logits are valid until the next call. ``latent_positions`` ``[Q,q]`` and
        ``question_positions`` ``[Q]``: rows of the latents of every question, and the question's last row. Raises
        :class:`FusionError` if ``L`` is more than ``capacity``.
        """
        ...

    def decode(self, embedding: Floats) -> Floats:
        """Append one token's embedding ``[D]``: logits ``[V]``, valid until the next call.

        Raises :class:`FusionError` if the sequence is as long as it may grow.
        """
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@runtime_checkable
class Interruptible(Protocol):
    """A backend whose runs may take long, and can be ended early."""

    def interrupt(self) -> None:
        """Have a run that another thread waits for, and every later one, fail at once; a step may end first.

        May be called at any time, also while another thread closes the backend. :meth:`Backend.close` follows.
        """
        ...


def check_capacity(length: int, capacity: int) -> None:
    """Raise :class:`FusionError` if a sequence of ``length`` positions is longer than it may grow."""
    if length > capacity:
        raise FusionError(
            f"The sequence has {length} positions, more than the {capacity} that it was started with; "
            "start it with a larger capacity."
        )
