"""The interface of a backend: it runs the three graphs and keeps the KV cache."""

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
    """Inputs of the LLM that depend on the image only."""

    latents: Floats
    """``[q,D]``: input rows of the LLM."""
    keys: Any
    """``[layers,q,9,D]``: a tensor of the backend on its device."""
    values: Any
    """As ``keys``."""


@dataclass(frozen=True, eq=False)
class KvPrefix:
    """The start of a prompt in a KV cache. The backend frees its memory when the object is garbage."""

    length: int
    """Tokens."""
    memory: Any
    """Memory of the backend on its device."""


class Backend(Protocol):
    """Runs the three graphs. Any thread may call it, one call at a time.

    ``runtime/bundle/graphs.py`` defines the shapes. Arrays in and out are float32, also if the graphs compute in
    another dtype. ``tests/support/backend_contract.py`` tests this interface.
    """

    name: str
    max_context: int
    """Limit of tokens in a sequence. Engines may have a lower limit than the bundle."""

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> npt.ArrayLike:
        """Run the vision encoder: ``[N,3,S,S]``, ``[N,T,D]``, ``[N,T]`` -> features ``[N,P,D]``.

        The features are a tensor of the backend on its device; ``numpy.asarray`` copies them to the host.
        """
        ...

    def align(self, features: Any, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        """Run the alignment decoder on the features of the four global crops, or on ``[4,P,D]`` on the host."""
        ...

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
        prefix: KvPrefix | None = None,
    ) -> Floats:
        """Replace the sequence by ``embeddings`` ``[L,D]`` and return the logits ``[V]`` of the last token.

        With a ``prefix``, the sequence is its tokens and then ``embeddings``. It may grow to ``capacity`` tokens, the
        prefix included. The logits are valid until the next call. ``latent_positions`` ``[Q,q]`` are the rows of each
        question's latents in ``embeddings``, ``question_positions`` ``[Q]`` its last row. Raises :class:`FusionError`
        if the sequence exceeds ``capacity``.
        """
        ...

    def prefill_prefix(self, embeddings: Floats) -> KvPrefix:
        """Run the start of prompts, ``[L,D]`` without latents, and keep its KV cache. The sequence ends."""
        ...

    def decode(self, embedding: Floats) -> Floats:
        """Append one token's embedding ``[D]`` and return its logits ``[V]``, valid until the next call.

        Raises :class:`FusionError` if the sequence is at its capacity.
        """
        ...

    def rewind(self, length: int) -> None:
        """Drop the tokens after the first ``length``; the next decode step continues there.

        Raises :class:`FusionError` unless ``length`` is from 1, or from the length of the prefix, to that of the
        sequence.
        """
        ...

    def close(self) -> None:
        """Free all memory."""
        ...


@runtime_checkable
class Interruptible(Protocol):
    """A backend that can end a run early."""

    def interrupt(self) -> None:
        """Make the current run and later ones fail soon, until :meth:`resume`.

        Any thread may call this at any time, also during :meth:`Backend.close`.
        """
        ...

    def resume(self) -> None:
        """Let runs succeed again. Call it while nothing runs."""
        ...


def check_capacity(length: int, capacity: int) -> None:
    """Raise :class:`FusionError` if a sequence of ``length`` tokens exceeds its capacity."""
    if length > capacity:
        raise FusionError(
            f"The sequence has {length} tokens, more than its capacity of {capacity}; start it with a larger capacity."
        )


def check_rewind(length: int, prefix: int, tokens: int) -> None:
    """Raise :class:`FusionError` unless a sequence of ``tokens`` behind a ``prefix`` of tokens can rewind."""
    first = max(prefix, 1)
    if not first <= length <= tokens:
        raise FusionError(f"The sequence rewinds to {length} tokens; expected from {first} to {tokens}.")
