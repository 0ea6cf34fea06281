"""The ONNX Runtime backend, for CPUs and, with the CUDA provider, NVIDIA GPUs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.base import Floats, ImageAlignment, Integers, KvPrefix
from fusion_edge.runtime.backends.onnxruntime.graph import Graph, Input, Tensor
from fusion_edge.runtime.backends.onnxruntime.llm import LlmSession
from fusion_edge.runtime.bundle import graphs
from fusion_edge.runtime.bundle.reader import Bundle


class OnnxRuntimeBackend:
    """Implements :class:`fusion_edge.runtime.backends.base.Backend`."""

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None, spin: bool = False) -> None:
        """Load all three graphs. ``threads`` and ``spin`` are those of :class:`Graph`.

        Raises :class:`DeviceError` if the device does not start, :class:`FusionError` if a graph does not load.
        """
        self.name = f"onnxruntime-{device}"
        self.max_context = bundle.manifest.max_context
        self._config = bundle.manifest.model
        self._vision = Graph(bundle, graphs.VISION_ENCODER, device, threads, spin)
        self._alignment = Graph(bundle, graphs.ALIGNMENT_DECODER, device, threads, spin)
        llm = Graph(bundle, graphs.LLM, device, threads, spin)
        self._llm = LlmSession(llm, bundle.manifest)
        self._graphs = [self._vision, self._alignment, llm]

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Tensor:
        inputs = {"pixel_values": pixels, "text_embeds": text_embeds, "text_mask": text_mask}
        shape = (len(pixels), self._config.vision.patches, self._config.language.hidden_size)
        return self._vision.run(inputs, {"features": shape})["features"]

    def align(self, features: Input, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        inputs = {"features": features, "latent_cells": latent_cells, "context_cells": context_cells}
        alignment, width = self._config.alignment, self._config.language.hidden_size
        latents = len(latent_cells) ** 2
        context = (alignment.layers, latents, alignment.window_size**2, width)
        shapes = {"latents": (1, latents, width), "keys": context, "values": context}
        outputs = self._alignment.run(inputs, shapes)
        return ImageAlignment(np.asarray(outputs["latents"])[0], outputs["keys"], outputs["values"])

    def read_alignment(self, image: ImageAlignment) -> tuple[Floats, ...]:
        """Return an image's keys and values ``[layers,q,9,D]`` on the host."""
        return np.asarray(image.keys), np.asarray(image.values)

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
        prefix: KvPrefix | None = None,
    ) -> Floats:
        inputs = {
            "embeddings": embeddings[None],
            "latent_positions": latent_positions,
            "question_positions": question_positions,
            "keys": image.keys,
            "values": image.values,
        }
        return self._llm.prefill(inputs, len(embeddings), capacity, prefix)

    def prefill_prefix(self, embeddings: Floats) -> KvPrefix:
        return self._llm.prefill_prefix(embeddings[None], len(embeddings))

    def decode(self, embedding: Floats) -> Floats:
        return self._llm.decode(embedding)

    def rewind(self, length: int) -> None:
        self._llm.rewind(length)

    def interrupt(self) -> None:
        for graph in self._graphs:
            graph.interrupt()

    def resume(self) -> None:
        for graph in self._graphs:
            graph.interrupt(False)

    def close(self) -> None:
        del self._vision, self._alignment, self._llm
        self._graphs = []
