"""Labels and code of patches in the demo's training."""

from __future__ import annotations

import torch

from fusion_edge.benchmarks.demo.pictures import COLORS, SHAPES, Shape
from fusion_edge.benchmarks.demo.pretrain import Code, patch_labels

CROSS = Shape("cross", "white", (0, 1), center=(192, 64), radius=40, angle=0)  # center of the top right crop
LABEL = [1 + list(SHAPES).index("cross"), 1 + list(COLORS).index("white")]


def test_patches_are_labeled_in_their_crop_and_in_the_whole_picture() -> None:
    labels = patch_labels([CROSS]).reshape(5, 8, 8, 2)
    assert labels[1, 4, 4].tolist() == LABEL
    assert not labels[[0, 2, 3]].any()
    assert labels[4, 2, 6].tolist() == LABEL
    assert not labels[4, 4:].any()


def test_patch_code_is_readable() -> None:
    labels = torch.from_numpy(patch_labels([CROSS]))
    code = Code.draw(seed=0)
    features = code(labels)
    assert features.shape == (5, 64, 128)
    assert torch.equal(code.read(features + 0.2 * torch.randn(features.shape)), labels)
