"""A backend without graphs: deterministic sums in NumPy that fulfill ``runtime/backends/base.py``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.base import Floats, ImageAlignment, Integers, check_capacity
from fusion_edge.runtime.bundle.config import FusionConfig


class FakeBackend:
    """Records the name and arguments of every call in ``calls``."""

    name = "fake"

    def __init__(self, config: FusionConfig) -> None:
        self.config = config
        self.max_context = config.max_length
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self._capacity = 0
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
    ) -> Floats:
        self.calls.append(("prefill", (embeddings, image, latent_positions, question_positions, capacity)))
        check_capacity(len(embeddings), capacity)
        rows = embeddings.copy()
        for latents, question in zip(latent_positions, question_positions, strict=True):
            rows[latents] += embeddings[question] + image.keys[:, :, 0].mean(axis=0)
        self._rows, self._capacity = list(rows), capacity
        return self._logits()

    def decode(self, embedding: Floats) -> Floats:
        self.calls.append(("decode", (embedding,)))
        check_capacity(len(self._rows) + 1, self._capacity)
        self._rows.append(embedding.copy())
        return self._logits()

    def _logits(self) -> Floats:
        weights = 1 / np.arange(1, len(self._rows) + 1, dtype=np.float32)  # makes the order of rows matter
        return (weights @ np.array(self._rows) @ self._readout).astype(np.float32)

    def close(self) -> None:
        self.calls.append(("close", ()))
        self._rows.clear()
