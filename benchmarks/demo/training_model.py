"""Training objective of the demo model in the eager interpreter (docs/fusion-model.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_edge.benchmarks.demo.codes import BACKGROUNDS, Codes
from fusion_edge.benchmarks.demo.gallery import KERNEL, REDUCTION
from fusion_edge.benchmarks.demo.initialize import CONFIG, PATCH_KERNEL
from fusion_edge.benchmarks.demo.training_data import IGNORED, Batch
from fusion_edge.export.checkpoint.tensor_mapping import parameters
from fusion_edge.export.model import architecture
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS
from fusion_edge.runtime.images.grids import alignment_cells

MAPPING_WEIGHT = 0.1
CODE_WEIGHT = 4.0  # of the squared error of codes, beside the cross-entropy of what a patch shows
BACKGROUND_WEIGHT = 0.2  # most patches are background
SHARPNESS = 1 / 8  # factor of the products of features and codes


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

    def __init__(self, leaves: Mapping[str, Tensor], batch: Batch | None = None) -> None:
        """``batch``: the sequences of the LLM, None to run the vision encoder alone."""
        super().__init__(CONFIG, self._parameter)
        self.leaves = leaves
        self._table = parameters(CONFIG)
        self._ready: dict[str, Tensor] = {}
        self._rows: Tensor | None = None
        self._batch = batch

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
        mean = torch.bmm(self._rows[:, None].to(x.dtype), x)
        return mean.expand(-1, x.shape[1] - rows, -1)

    def positions(self, past: int, length: int) -> Tensor:
        """Return the positions ``[B,L]`` of the batch."""
        assert self._batch is not None
        assert (past, length) == (0, self._batch.positions.shape[1])
        return self._batch.positions

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, key_mask: Tensor) -> Tensor:
        """Compute attention as matrix products: torch's fused backward pass is ten times as slow for heads of 16."""

        def per_head(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

        scores = (per_head(q) @ per_head(k).transpose(2, 3)) * (q.shape[-1] // heads) ** -0.5
        if key_mask.shape[1] > CONFIG.vision.patches:  # only text is padded
            scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
        attended: Tensor = scores.softmax(-1).to(v.dtype) @ per_head(v)
        return attended.transpose(1, 2).reshape(q.shape)

    def context_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """Attend from all questions of a picture ``[R,q,D]`` to its windows ``[I,q,9,D]``, which are not repeated."""
        images, latents, _, width = k.shape
        # [I, q, heads, questions of a picture or rows of a window, dim]
        queries = q.reshape(images, -1, latents, heads, width // heads).permute(0, 2, 3, 1, 4)
        keys, values = (x.reshape(*x.shape[:3], heads, -1).transpose(2, 3) for x in (k, v))
        scores = (queries @ keys.transpose(3, 4)) * (width // heads) ** -0.5
        attended: Tensor = scores.softmax(-1).to(values.dtype) @ values
        return attended.permute(0, 3, 1, 2, 4).reshape(q.shape)

    def causal_attention(self, qkv: Tensor, layer: int) -> Tensor:
        """Compute attention within conversations as matrix products, as :meth:`attention`."""
        assert self._batch is not None
        q, k, v = self.heads(qkv, layer)
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~self._batch.attended.unsqueeze(1), float("-inf")).softmax(-1)
        attended: Tensor = weights.to(v.dtype) @ v
        return attended.transpose(1, 2).reshape(*qkv.shape[:2], -1)


@dataclass(frozen=True)
class Outcome:
    """Losses and exact answers of a batch."""

    answer_loss: Tensor
    mapping_loss: Tensor
    correct: Tensor
    """``[R, turns]`` bool: greedy decoding gives the exact answer."""


def run(leaves: Mapping[str, Tensor], batch: Batch, align: bool = True) -> Outcome:
    """Run a forward pass; ``align=False`` disables the interaction layers."""
    ops = TrainingOperations(leaves, batch)
    latents, windows = _pooled(ops, batch)
    sequences = len(batch.tokens) // len(batch.patches)  # of a picture
    x = F.embedding(batch.tokens, ops.get("llm.embed_tokens.weight"))
    mapping_loss = x.new_zeros(())
    if batch.inputs.image_tokens:
        if batch.features is None:
            local = embedded_patches(ops, batch.patches[:, GLOBAL_CROPS])
            image, mapping_loss = _local(ops, batch, local.repeat_interleave(sequences, 0))
        else:
            image = batch.features[:, GLOBAL_CROPS].repeat_interleave(sequences, 0)
        start = batch.image_start
        x = torch.cat([x[:, :start], image.to(x.dtype), x[:, start + image.shape[1] :]], 1)
    rows = _flat(batch.latent_rows, x.shape[1])
    repeated = (batch.inputs.latent_scale * latents).repeat_interleave(len(rows) // len(latents), 0)
    flat = x.flatten(0, 1).index_copy(0, rows.flatten(), repeated.flatten(0, 1).to(x.dtype))
    alignment = _alignment(ops, batch, windows) if align else None
    x = architecture.decoder(ops, CONFIG, flat.reshape(x.shape), alignment)

    answered = batch.targets != IGNORED
    logits = architecture.logits(ops, CONFIG, x[answered]).float()
    expected = batch.targets[answered]
    wrong = torch.zeros(batch.targets.shape).masked_scatter(answered, (logits.argmax(-1) != expected).float())
    return Outcome(
        answer_loss=F.cross_entropy(logits, expected),
        mapping_loss=mapping_loss,
        correct=_wrong_answers(wrong, batch.question_rows) == 0,
    )


def _wrong_answers(wrong: Tensor, question_rows: Tensor) -> Tensor:
    """Return the wrong tokens of each answer ``[R, turns]``, of the wrong rows ``[R, L]``.

    An answer starts at its question's last row and ends before the next one's.
    """
    total = F.pad(wrong.cumsum(1), (1, 0))
    ends = F.pad(question_rows[:, 1:], (0, 1), value=wrong.shape[1])
    return total.gather(1, ends) - total.gather(1, question_rows)


def patch_loss(leaves: Mapping[str, Tensor], codes: Codes, crops: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the vision tower on crops ``[I,C,P,432]``, and the share of covered patches it reads right.

    ``labels`` ``[I,C,P]`` are indices of ``codes.contents``.
    """
    features = crop_features(TrainingOperations(leaves), crops).float()
    contents = codes.contents
    weights = torch.where(labels < len(BACKGROUNDS), BACKGROUND_WEIGHT, 1.0)
    errors = (features - contents[labels] - codes.places).square().mean(-1)
    norms = contents.square().sum(-1) / 2  # the nearest code has the largest product less half of its square
    scores = SHARPNESS * ((features - codes.places) @ contents.T - norms)
    entropy = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none").reshape(labels.shape)
    covered = labels >= len(BACKGROUNDS)
    right = (scores.detach().argmax(-1) == labels)[covered].float().mean()
    return ((entropy + CODE_WEIGHT * errors) * weights).sum() / weights.sum(), right


def embedded_patches(ops: TrainingOperations, crops: Tensor) -> Tensor:
    """Return h_0 ``[...,P,W]`` of reduced crops ``[...,P,432]``."""
    kernel = ops.leaves[PATCH_KERNEL].flatten(1)
    patches = F.linear(crops, kernel, ops.get("vision.patch_embedding.bias"))
    return patches + ops.get("vision.position_embedding.weight")


def crop_features(ops: TrainingOperations, crops: Tensor) -> Tensor:
    """Return projected features ``[I,C,P,D]`` of reduced crops ``[I,C,P,432]``, encoded without text."""
    patches = embedded_patches(ops, crops).flatten(0, 1)
    no_text = patches[:, :0]
    rows = architecture.encode(ops, CONFIG, patches, no_text, torch.ones(no_text.shape[:2]))
    return architecture.project_vision(ops, rows).reshape(*crops.shape[:3], -1)


def _pooled(ops: TrainingOperations, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return latents ``[I,q,D]`` and their windows ``[I,q,9,D]``, encoded once per picture."""
    if batch.features is None:
        features = crop_features(ops, batch.patches[:, :GLOBAL_CROPS])
    else:
        features = batch.features[:, :GLOBAL_CROPS].float()
    cells = alignment_cells(2 * CONFIG.vision.grid, batch.inputs.query_length, CONFIG.alignment.window_size)
    return architecture.pool_image(ops, CONFIG, features.flatten(0, 1), *map(torch.from_numpy, cells))


def _alignment(ops: EagerOperations, batch: Batch, windows: Tensor) -> architecture.Alignment[Tensor]:
    """Return positions of latents and questions, and keys and values of each picture ``[layers * I,q,9,D]``."""
    pairs = [architecture.context_keys_values(ops, k, windows) for k in range(CONFIG.alignment.layers)]
    keys, values = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    length = batch.tokens.shape[1]
    return architecture.Alignment(_flat(batch.latent_rows, length), _flat(batch.question_rows, length), keys, values)


def _flat(rows: Tensor, length: int) -> Tensor:
    """Return rows ``[R, turns, ...]`` of sequences as rows ``[R * turns, ...]`` of the flattened batch."""
    starts = length * torch.arange(len(rows))
    return (rows + starts.reshape(-1, *[1] * (rows.ndim - 1))).flatten(0, 1)


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
    loss = (1 - vision).mean()
    if mask.any():
        loss = loss + (1 - F.cosine_similarity(instruct, text, dim=-1)[mask]).mean()
    return image, loss
