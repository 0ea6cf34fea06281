"""Training objective of the demo model in the eager interpreter (docs/fusion-model.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_edge.benchmarks.demo.initialize import CONFIG, PATCH_KERNEL
from fusion_edge.benchmarks.demo.training_data import IGNORED, KERNEL, REDUCTION, Batch, centered
from fusion_edge.export.checkpoint.tensor_mapping import parameters
from fusion_edge.export.model import architecture
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS
from fusion_edge.runtime.images.grids import alignment_cells

MAPPING_WEIGHT = 0.1
FEATURES_AT_ONCE = 50  # pictures


def with_small_kernel(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return trainable copies of a checkpoint's tensors, with the patch kernel summed over its squares."""
    leaves = {name: tensor.float().clone() for name, tensor in tensors.items()}
    kernel = leaves[PATCH_KERNEL]
    leaves[PATCH_KERNEL] = kernel.reshape(-1, 3, KERNEL, REDUCTION, KERNEL, REDUCTION).sum((3, 5))
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def with_full_kernel(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert :func:`with_small_kernel` for kernels that are constant on the squares."""
    tensors = {name: leaf.detach() for name, leaf in leaves.items()}
    kernel = tensors[PATCH_KERNEL] / REDUCTION**2
    tensors[PATCH_KERNEL] = kernel.repeat_interleave(REDUCTION, 2).repeat_interleave(REDUCTION, 3)
    return tensors


class TrainingOperations(EagerOperations):
    """Eager operations on checkpoint tensors, for a batch of questions of different lengths."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__(CONFIG, self._parameter)
        self.leaves = leaves
        self._table = parameters(CONFIG)
        self._ready: dict[str, Tensor] = {}
        self._rows: Tensor | None = None

    def _parameter(self, name: str) -> Tensor:
        """Assemble a parameter from its sources (``export/checkpoint/tensor_mapping.py``), once per step."""
        if name not in self._ready:
            parts = []
            for source in self._table[name].sources:
                part = self.leaves[source.tensor]
                part = part if source.row_range is None else part[slice(*source.row_range)]
                parts.append(part if source.column_range is None else part[:, slice(*source.column_range)])
            self._ready[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._ready[name]

    def key_mask(self, patches: Tensor, text_mask: Tensor) -> Tensor:
        """Return the base class's mask, and keep the weights of rows without padding."""
        mask = super().key_mask(patches, text_mask)
        self._rows = mask / mask.sum(1, keepdim=True)
        return mask

    def mean_for_tail_rows(self, x: Tensor, rows: int) -> Tensor:
        """Return the mean over rows without padding, so that a batch matches its questions one by one."""
        assert self._rows is not None
        mean = torch.bmm(self._rows[:, None], x)
        return mean.expand(-1, x.shape[1] - rows, -1)


@dataclass(frozen=True)
class Outcome:
    """Losses and exact answers of a batch."""

    answer_loss: Tensor
    mapping_loss: Tensor
    correct: Tensor
    """``[R]`` bool: greedy decoding gives the exact answer."""


def run(leaves: Mapping[str, Tensor], batch: Batch, align: bool = True) -> Outcome:
    """Run a forward pass; ``align=False`` disables the interaction layers."""
    ops = TrainingOperations(leaves)
    latents, windows = _pooled(ops, batch)
    questions = len(batch.questions) // len(batch.patches)
    x = F.embedding(batch.tokens, ops.get("llm.embed_tokens.weight"))
    image, mapping_loss = x[:, :0], x.new_zeros(())
    if batch.image_tokens:
        local = embedded_patches(ops, batch.patches[:, GLOBAL_CROPS])
        image, mapping_loss = _local(ops, batch, local.repeat_interleave(questions, 0))
    after_image, after_latents = batch.image_start + image.shape[1], batch.latent_start + batch.query_length
    latents = batch.latent_scale * latents.repeat_interleave(questions, 0)
    gap = x[:, after_image : batch.latent_start]
    x = torch.cat([x[:, : batch.image_start], image, gap, latents, x[:, after_latents:]], 1)
    x = architecture.decoder(ops, CONFIG, x, _alignment(ops, batch, windows) if align else None)

    answered = batch.targets != IGNORED
    logits = architecture.logits(ops, CONFIG, x[answered])
    expected = batch.targets[answered]
    wrong = torch.zeros(batch.targets.shape).masked_scatter(answered, (logits.argmax(-1) != expected).float())
    return Outcome(
        answer_loss=F.cross_entropy(logits, expected),
        mapping_loss=mapping_loss,
        correct=wrong.sum(1) == 0,
    )


def embedded_patches(ops: TrainingOperations, crops: Tensor) -> Tensor:
    """Return h_0 ``[...,P,W]`` of reduced crops ``[...,P,192]``."""
    kernel = ops.leaves[PATCH_KERNEL].flatten(1)
    patches = F.linear(crops, kernel, ops.get("vision.patch_embedding.bias"))
    return patches + ops.get("vision.position_embedding.weight")


def crop_features(ops: TrainingOperations, crops: Tensor) -> Tensor:
    """Return projected features ``[I,C,P,D]`` of reduced crops ``[I,C,P,192]``, encoded without text."""
    patches = embedded_patches(ops, crops).flatten(0, 1)
    no_text = patches[:, :0]
    rows = architecture.encode(ops, CONFIG, patches, no_text, torch.ones(no_text.shape[:2]))
    return architecture.project_vision(ops, rows).reshape(*crops.shape[:3], -1)


def gallery_features(leaves: Mapping[str, Tensor], crops: npt.NDArray[np.uint8]) -> Tensor:
    """Return float16 features ``[N,4,P,D]`` of a gallery's crops ``[N,5,P,192]``, for a frozen vision tower."""
    with torch.no_grad():
        ops = TrainingOperations(leaves)
        parts = torch.split(torch.from_numpy(crops[:, :GLOBAL_CROPS]), FEATURES_AT_ONCE)
        return torch.cat([crop_features(ops, centered(part)).half() for part in parts])


def _pooled(ops: TrainingOperations, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return latents ``[I,q,D]`` and their windows ``[I,q,9,D]``, encoded once per picture."""
    features = batch.features
    if features is None:
        features = crop_features(ops, batch.patches[:, :GLOBAL_CROPS])
    cells = alignment_cells(2 * CONFIG.vision.grid, batch.query_length, CONFIG.alignment.window_size)
    return architecture.pool_image(ops, CONFIG, features.flatten(0, 1), *map(torch.from_numpy, cells))


def _alignment(ops: EagerOperations, batch: Batch, windows: Tensor) -> architecture.Alignment[Tensor]:
    """Return positions of latents and questions, and each picture's keys and values for each of its questions."""
    starts = torch.arange(len(batch.questions)) * batch.tokens.shape[1]
    layers = range(CONFIG.alignment.layers)
    pairs = [architecture.context_keys_values(ops, k, windows) for k in layers]
    questions = len(batch.questions) // len(windows)
    keys, values = (torch.cat(parts).repeat_interleave(questions, 0) for parts in zip(*pairs, strict=True))
    positions = starts[:, None] + batch.latent_start + torch.arange(batch.query_length)
    return architecture.Alignment(positions, starts + batch.question_rows, keys, values)


def _local(ops: EagerOperations, batch: Batch, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return image tokens ``[R,P,D]`` of the text-guided local crops ``[R,P,W]``, and the semantic mapping loss.

    The loss reconstructs each space through the other's projector.
    """
    instruct = F.embedding(batch.instruct, ops.get("llm.embed_tokens.weight"))
    mask = batch.instruct != 0
    rows = architecture.encode(ops, CONFIG, patches, architecture.project_text(ops, instruct), mask)
    features = architecture.project_vision(ops, rows)
    image, text = torch.split(features, [patches.shape[1], mask.shape[1]], dim=1)
    vision = F.cosine_similarity(patches, architecture.project_text(ops, image), dim=-1)
    language = F.cosine_similarity(instruct, text, dim=-1)[mask]
    return image, (1 - vision).mean() + (1 - language).mean()
