"""Pre-training of the demo's vision tower, which in a released model is a pre-trained SigLIP.

Every patch learns to tell the kind and the colour of the shape that covers it, by two linear heads on the projected
features, which are thrown away afterwards.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.initialize import CONFIG
from fusion_edge.benchmarks.demo.training_data import Gallery, centered
from fusion_edge.benchmarks.demo.training_model import TrainingOperations, crop_features
from fusion_edge.runtime.config import GLOBAL_CROPS

PICTURES_A_STEP = 12
LEARNING_RATE = 2e-3
BACKGROUND_WEIGHT = 0.2  # most patches show none: they must not drown the others
KINDS, COLORS = tuple(pictures.SHAPES), tuple(pictures.COLORS)

log = logging.getLogger(__name__)


def pretrain(leaves: dict[str, Tensor], gallery: Gallery, steps: int, seed: int) -> None:
    """Train the tensors of the vision tower and ``mm_projector`` in place."""
    trained = [leaf for name, leaf in leaves.items() if "vision_tower" in name or "mm_projector" in name]
    trained = [leaf for leaf in trained if leaf.requires_grad]
    hidden = CONFIG.language.hidden_size
    heads = [torch.nn.Linear(hidden, len(names) + 1) for names in (KINDS, COLORS)]
    weights = [trained, [parameter for head in heads for parameter in head.parameters()]]
    optimizer = torch.optim.AdamW([{"params": group} for group in weights], lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = np.random.default_rng([seed, step]).choice(len(gallery.shapes), PICTURES_A_STEP, replace=False)
        crops = centered(torch.from_numpy(gallery.crops[chosen]))
        labels = torch.from_numpy(np.stack([patch_labels(gallery.shapes[i]) for i in chosen]))
        features = crop_features(TrainingOperations(leaves), crops).flatten(0, 2)
        losses, right = zip(
            *(_loss(head(features), labels[..., i].flatten()) for i, head in enumerate(heads)), strict=True
        )
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            log.info("vision step %d of %d: covered patches right: kind %.1f%%, color %.1f%%", step + 1, steps, *right)


def patch_labels(shapes: list[pictures.Shape]) -> npt.NDArray[np.int64]:
    """``[5, P, 2]``: for every patch of every crop 1 + index of the kind and colour that covers it, or 0."""
    grid = CONFIG.vision.grid
    fine, coarse = _map(shapes, 2 * grid), _map(shapes, grid)
    crops = fine.reshape(2, grid, 2, grid, 2).swapaxes(1, 2).reshape(GLOBAL_CROPS, grid * grid, 2)
    return np.concatenate([crops, coarse.reshape(1, grid * grid, 2)])


def _map(shapes: list[pictures.Shape], side: int) -> npt.NDArray[np.int64]:
    labels = np.zeros((side, side, 2), np.int64)
    centres = (np.arange(side) + 0.5) * pictures.PICTURE_SIZE / side
    for shape in shapes:
        x, y = shape.center
        covered = np.hypot(centres[:, None] - y, centres[None, :] - x) < shape.radius
        labels[covered] = 1 + KINDS.index(shape.kind), 1 + COLORS.index(shape.color)
    return labels


def _loss(scores: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy, and the percentage of covered patches that are right."""
    weight = torch.ones(scores.shape[-1])
    weight[0] = BACKGROUND_WEIGHT
    covered = labels > 0
    right = (scores.argmax(-1) == labels)[covered].float().mean().item()
    return F.cross_entropy(scores, labels, weight), 100 * right
