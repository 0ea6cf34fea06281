"""Pre-training of the demo's vision tower, which in a released model is a pre-trained SigLIP.

Every patch learns a fixed code of what covers it: the sum of a random vector for the kind, the color and the place. An
LLM learns to use such features within minutes; with a classifier's features it failed even after 8,000 steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.initialize import CONFIG, grid_positions
from fusion_edge.benchmarks.demo.training_data import Gallery, centered
from fusion_edge.benchmarks.demo.training_model import TrainingOperations, crop_features
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS

PICTURES_PER_STEP = 12
LEARNING_RATE = 2e-3
BACKGROUND_WEIGHT = 0.2  # most patches are background
PLACE_SCALE = 0.15
KINDS, COLORS = tuple(pictures.SHAPES), tuple(pictures.COLORS)

log = logging.getLogger(__name__)


def pretrain(leaves: dict[str, Tensor], gallery: Gallery, steps: int, seed: int) -> None:
    """Train the tensors of the vision tower and ``mm_projector`` in place."""
    trained = [leaf for name, leaf in leaves.items() if "vision_tower" in name or "mm_projector" in name]
    trained = [leaf for leaf in trained if leaf.requires_grad]
    code = Code.draw(seed)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = np.random.default_rng([seed, step]).choice(len(gallery.shapes), PICTURES_PER_STEP, replace=False)
        crops = centered(torch.from_numpy(gallery.crops[chosen]))
        labels = torch.from_numpy(np.stack([patch_labels(gallery.shapes[i]) for i in chosen]))
        features = crop_features(TrainingOperations(leaves), crops)
        errors = (features - code(labels)).square().mean(-1)
        weights = torch.where(labels[..., 0] > 0, 1.0, BACKGROUND_WEIGHT)
        optimizer.zero_grad()
        ((errors * weights).sum() / weights.sum()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            right = (code.read(features.detach()) == labels)[labels[..., 0] > 0].float().mean(0)
            log.info(
                "vision step %d of %d: error %.3f, covered patches right: kind %.1f%%, color %.1f%%",
                *(step + 1, steps, errors.mean().item(), *(100 * right).tolist()),
            )


@dataclass(frozen=True)
class Code:
    """Target features of the patches."""

    kinds: Tensor
    """``[kinds + 1, D]``; the first row means no shape."""
    colors: Tensor
    places: Tensor
    """``[P, D]``."""

    @classmethod
    def draw(cls, seed: int) -> Code:
        """Draw random vectors; those of places are short, and similar for neighbors."""
        generator = torch.Generator().manual_seed(seed)
        hidden = CONFIG.language.hidden_size
        kinds, colors = (torch.randn(len(names) + 1, hidden, generator=generator) for names in (KINDS, COLORS))
        grid = grid_positions(CONFIG.vision.grid, hidden)
        return cls(kinds, colors, grid @ torch.randn(hidden, hidden, generator=generator) * PLACE_SCALE)

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the features ``[..., P, D]`` of labels ``[..., P, 2]``."""
        return self.kinds[labels[..., 0]] + self.colors[labels[..., 1]] + self.places

    def read(self, features: Tensor) -> Tensor:
        """Return the nearest labels ``[..., P, 2]`` of features ``[..., P, D]``."""
        pairs = (self.kinds[:, None] + self.colors).flatten(0, 1)
        nearest = torch.cdist(features - self.places, pairs).argmin(-1)
        return torch.stack([nearest // len(self.colors), nearest % len(self.colors)], -1)


def patch_labels(shapes: list[pictures.Shape]) -> npt.NDArray[np.int64]:
    """Return ``[5, P, 2]``: 1 + index of the kind and color that covers each patch of each crop, or 0."""
    grid = CONFIG.vision.grid
    fine, coarse = _map(shapes, 2 * grid), _map(shapes, grid)
    crops = fine.reshape(2, grid, 2, grid, 2).swapaxes(1, 2).reshape(GLOBAL_CROPS, grid * grid, 2)
    return np.concatenate([crops, coarse.reshape(1, grid * grid, 2)])


def _map(shapes: list[pictures.Shape], side: int) -> npt.NDArray[np.int64]:
    labels = np.zeros((side, side, 2), np.int64)
    centers = (np.arange(side) + 0.5) * pictures.PICTURE_SIZE / side
    for shape in shapes:
        x, y = shape.center
        covered = np.hypot(centers[:, None] - y, centers[None, :] - x) < shape.radius
        labels[covered] = 1 + KINDS.index(shape.kind), 1 + COLORS.index(shape.color)
    return labels
