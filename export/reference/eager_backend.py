"""The eager interpreter as a backend of the runtime: the reference for all other backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights, Weights, read_parameter
from fusion_edge.export.model import architecture
from fusion_edge.export.model.architecture import Alignment
from fusion_edge.export.model.eager import EagerOperations, KeyValueCache
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.export.planning.rules import EMBEDDING
from fusion_edge.runtime import Fusion
from fusion_edge.runtime.backends.base import (
    Floats,
    ImageAlignment,
    Integers,
    KvPrefix,
    check_capacity,
    check_rewind,
)
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.bundle.manifest import TOKENIZER


class EagerBackend:
    """A :class:`~fusion_edge.runtime.backends.base.Backend` in torch; by default in float32 on the CPU."""

    name = "eager"

    def __init__(
        self,
        config: FusionConfig,
        weights: Weights,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.max_context = config.max_length
        self._device, self._dtype = device, dtype
        self._weights = weights
        self.parameter = lru_cache(maxsize=None)(self._parameter)
        self._activation_quantization = lru_cache(maxsize=None)(weights.activation_quantization)
        self._cache = KeyValueCache()
        self._prefix_length = self._length = self._capacity = 0

    def _parameter(self, name: str) -> Tensor:
        return self._tensor(np.array(read_parameter(self._weights, name)))

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """Move an array to the device; floats get the backend's dtype."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def _floats(self, tensor: Tensor) -> Floats:
        floats: Floats = tensor.float().cpu().numpy()
        return floats

    def embed(self, token_ids: Integers) -> Floats:
        """Return the LLM's input embeddings ``[n,D]``, from the weights instead of a bundle's table."""
        return self._floats(self.parameter(f"{EMBEDDING}.weight")[self._tensor(token_ids)])

    def operations(self) -> EagerOperations:
        """Return the interpreter with these weights and the current KV cache."""
        return EagerOperations(self.config, self.parameter, self._cache, self._activation_quantization)

    @torch.inference_mode()
    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Floats:
        inputs = (self._tensor(array) for array in (pixels, text_embeds, text_mask))
        return self._floats(architecture.vision_encoder(self.operations(), self.config, *inputs))

    @torch.inference_mode()
    def align(self, features: Floats, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        inputs = (self._tensor(array) for array in (features, latent_cells, context_cells))
        latents, keys, values = architecture.alignment_decoder(self.operations(), self.config, *inputs)
        return ImageAlignment(self._floats(latents[0]), keys, values)

    @torch.inference_mode()
    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
        prefix: KvPrefix | None = None,
    ) -> Floats:
        before = 0 if prefix is None else prefix.length
        check_capacity(before + len(embeddings), capacity)
        self._prefix_length, self._length, self._capacity = before, before + len(embeddings), capacity
        self._cache = KeyValueCache() if prefix is None else KeyValueCache(prefix.memory)
        positions = self._tensor(latent_positions), self._tensor(question_positions)
        alignment = Alignment(*positions, image.keys, image.values)
        return self._logits(self.hidden(embeddings, alignment))

    @torch.inference_mode()
    def prefill_prefix(self, embeddings: Floats) -> KvPrefix:
        self._cache = KeyValueCache()
        self._prefix_length = self._length = self._capacity = 0
        self.hidden(embeddings, None)
        return KvPrefix(len(embeddings), self._cache.layers)

    def hidden(self, embeddings: Floats, alignment: Alignment[Tensor] | None) -> Tensor:
        """Return hidden states ``[1,L,D]`` before the final norm. Appends to the KV cache."""
        return architecture.decoder(self.operations(), self.config, self._tensor(embeddings)[None], alignment)

    @torch.inference_mode()
    def decode(self, embedding: Floats) -> Floats:
        check_capacity(self._length + 1, self._capacity)
        self._length += 1
        return self._logits(self.hidden(embedding[None], None))

    def rewind(self, length: int) -> None:
        check_rewind(length, self._prefix_length, self._length)
        self._cache.rewind(length)
        self._length = length

    def _logits(self, hidden: Tensor) -> Floats:
        operations = self.operations()
        last = operations.last_row(hidden)
        return self._floats(architecture.logits(operations, self.config, last)[0])

    def close(self) -> None:
        self.parameter.cache_clear()


@contextmanager
def open_checkpoint(
    folder: Path, backend: type[EagerBackend] = EagerBackend, image_tokens: int | None = None
) -> Iterator[Fusion]:
    """Open a checkpoint as a :class:`Fusion`, without an export. Offers all query lengths.

    ``image_tokens`` is that of ``fusion-export``. Raises :class:`FusionError` for a checkpoint that cannot be read.
    """
    with Checkpoint(folder) as checkpoint:
        plan = plan_export(checkpoint, ExportOptions(precision="fp32", image_tokens=image_tokens))
        eager = backend(plan.config, CheckpointWeights(checkpoint, plan.parameters))
        tokenizer = Tokenizer.from_str(plan.small_files[TOKENIZER].decode())
        with Fusion(plan.manifest(()), eager, tokenizer, eager.embed) as fusion:
            yield fusion
