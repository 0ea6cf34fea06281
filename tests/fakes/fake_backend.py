"""A backend without graphs: deterministic sums in NumPy that fulfill ``runtime/backends/base.py``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.base import (
    Floats,
    ImageAlignment,
    Integers,
    KvPrefix,
    check_capacity,
    check_rewind,
)
from fusion_edge.runtime.bundle.config import FusionConfig


class FakeBackend:
    """Records the name and arguments of every call in ``calls``."""

    name = "fake"

    def __init__(self, config: FusionConfig) -> None:
        self.config = config
        self.max_context = config.max_length
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self._capacity = self._prefix_length = 0
        self._rows: list[Floats] = []
        width = config.language.hidden_size
        self._readout = np.random.default_rng(0).normal(size=(width, config.language.vocab_size)).astype(np.float32)

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Floats:
        self.calls.append(("encode", (pixels, text_embeds, text_mask)))
        patches, width = self.config.vision.patches, self.config.language.hidden_size
        parts = pixels.reshape(len(pixels), -1)[:, : patches * width].reshape(-1, patches, width)
        text = (text_embeds * text_mask[..., None]).sum(axis=1, keepdims=True)
        features: Floats = parts + text
        return features

    def align(self, features: Floats, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        self.calls.append(("align", (features, latent_cells, context_cells)))
        alignment, width = self.config.alignment, self.config.language.hidden_size
        latents = np.tile(features.mean(axis=(0, 1)), (len(latent_cells) ** 2, 1))
        keys = np.ones((alignment.layers, len(latents), alignment.window_size**2, width), np.float32)
        return ImageAlignment(latents, keys * latents[0], keys)

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
        prefix: KvPrefix | None = None,
    ) -> Floats:
        self.calls.append(("prefill", (embeddings, image, latent_positions, question_positions, capacity, prefix)))
        before: list[Floats] = [] if prefix is None else prefix.memory
        check_capacity(len(before) + len(embeddings), capacity)
        rows = embeddings.copy()
        for latents, question in zip(latent_positions, question_positions, strict=True):
            rows[latents] += embeddings[question] + image.keys[:, :, 0].mean(axis=0)
        self._rows, self._prefix_length, self._capacity = [*before, *rows], len(before), capacity
        return self._logits()

    def prefill_prefix(self, embeddings: Floats) -> KvPrefix:
        self.calls.append(("prefill_prefix", (embeddings,)))
        self._rows, self._prefix_length, self._capacity = [], 0, 0
        return KvPrefix(len(embeddings), list(embeddings.copy()))

    def decode(self, embedding: Floats) -> Floats:
        self.calls.append(("decode", (embedding,)))
        check_capacity(len(self._rows) + 1, self._capacity)
        self._rows.append(embedding.copy())
        return self._logits()

    def rewind(self, length: int) -> None:
        self.calls.append(("rewind", (length,)))
        check_rewind(length, self._prefix_length, len(self._rows))
        del self._rows[length:]

    def _logits(self) -> Floats:
        weights = 1 / np.arange(1, len(self._rows) + 1, dtype=np.float32)  # makes the order of rows matter
        return (weights @ np.array(self._rows) @ self._readout).astype(np.float32)

    def close(self) -> None:
        self.calls.append(("close", ()))
        self._rows.clear()
