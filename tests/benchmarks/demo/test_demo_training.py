"""Labels and code of patches in the demo's training, and exactness of ``demo.fidelity``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fusion_edge.benchmarks.demo import fidelity
from fusion_edge.benchmarks.demo.evaluate import held_out
from fusion_edge.benchmarks.demo.pictures import COLORS, SHAPES, Shape
from fusion_edge.benchmarks.demo.pretrain import Code, patch_labels
from fusion_edge.export import cli

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


def test_float_bundle_matches_its_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--fp32"]) == 0
    result = fidelity.compare(tmp_path / "b", held_out(4))
    assert len(result.cosines) == 4
    assert np.all(result.cosines > 0.99999)
    assert result.same_token.all()
