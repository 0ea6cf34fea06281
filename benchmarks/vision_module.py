"""The vision encoder as torch modules, for benchmark peers that run or trace those. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.export.model import architecture
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.runtime.bundle.config import FusionConfig


class _WithoutText(EagerOperations):
    """Operations for crops without text.

    No text is appended to the patches, and attention has no mask: the peers' fastest kernels do not support one.
    """

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return parts[0] if axis == 1 else super().concat(parts, axis)

    def head_rows(self, x: Tensor, rows: int) -> Tensor:
        return x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, key_mask: Tensor) -> Tensor:
        queries, keys, values = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(q.shape)


class _Encoder(torch.nn.Module):
    """Base with the parameters of :func:`read_vision`, which several encoders may share."""

    operations: type[EagerOperations] = EagerOperations

    def __init__(self, config: FusionConfig, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        for name, value in parameters.items():
            self.register_buffer(name.replace(".", "/"), value)
        self.ops = self.operations(config, lambda name: self.get_buffer(name.replace(".", "/")))


class GlobalCrops(_Encoder):
    """Encoder of global crops: ``[N,3,S,S]`` -> features ``[N,P,D]``."""

    operations = _WithoutText

    def forward(self, pixels: Tensor) -> Tensor:
        text = pixels.new_zeros((1, 0, self.config.language.hidden_size))
        mask = pixels.new_zeros((1, 0), dtype=torch.bool)
        return architecture.vision_encoder(self.ops, self.config, pixels, text, mask)


class LocalCrop(_Encoder):
    """Encoder of the local crop: ``[1,3,S,S]``, text embeddings ``[1,T,D]``, mask ``[1,T]`` -> features ``[1,P,D]``."""

    def forward(self, pixels: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return architecture.vision_encoder(self.ops, self.config, pixels, text, mask)


def read_vision(folder: Path, dtype: torch.dtype) -> tuple[FusionConfig, dict[str, Tensor]]:
    """Return the model's config and the parameters of its vision encoder. Raises :class:`FusionError`."""
    with Checkpoint(folder) as checkpoint:
        plan = plan_export(checkpoint, ExportOptions(precision="fp32"))
        weights = CheckpointWeights(checkpoint, plan.parameters)
        names = [name for name in plan.parameters if name.startswith("vision.")]
        return plan.config, {
            name: torch.from_numpy(np.array(read_parameter(weights, name))).to(dtype) for name in names
        }
