"""Pictures and questions as the tensors of one training step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.initialize import CONFIG
from fusion_edge.benchmarks.demo.tokenizer import SYSTEM, Tokenizer
from fusion_edge.runtime.config import GLOBAL_CROPS, IMAGE_SIZE

REDUCTION = 6
"""Training sees averages of 6 x 6 pixels, so the patch kernels it learns are constant on such squares."""
KERNEL = CONFIG.vision.patch_size // REDUCTION  # averages on a side of one patch
IGNORED = -100  # cross_entropy's mark of a position without a target

PREFIX = f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n<vision_start>"
BETWEEN = "<vision_end><vision_start>"
QUESTION = "<vision_end>\n{}<|end|>\n<|assistant|>\n"
ANSWER = "{}<|end|>"


def reduce_crops(picture: pictures.Pixels) -> npt.NDArray[np.uint8]:
    """The five crops (FUSION.md section 1) in averages of 6 x 6: ``[5, patches, 3 * 8 * 8]``."""
    whole = Image.fromarray(picture)
    local = np.asarray(whole.resize((IMAGE_SIZE, IMAGE_SIZE)).reduce(REDUCTION))
    double = np.asarray(whole.resize((2 * IMAGE_SIZE, 2 * IMAGE_SIZE)).reduce(REDUCTION))
    side, grid = IMAGE_SIZE // REDUCTION, CONFIG.vision.grid
    crops = [double[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
    blocks = np.stack([*crops, local]).reshape(GLOBAL_CROPS + 1, grid, KERNEL, grid, KERNEL, 3)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(GLOBAL_CROPS + 1, grid * grid, -1)


@dataclass(frozen=True)
class Gallery:
    """Rendered pictures: their reduced crops ``[N, 5, patches, 192]`` uint8 and what they show."""

    crops: npt.NDArray[np.uint8]
    shapes: list[list[pictures.Shape]]

    @classmethod
    def render(cls, split: str, seed: int, count: int) -> Gallery:
        """The first ``count`` pictures of a split and seed."""
        crops, shapes = [], []
        for scene, picture in zip(range(count), pictures.scenes(split, seed), strict=False):
            del scene
            shapes.append(picture[0])
            crops.append(reduce_crops(picture[1]))
        return cls(np.stack(crops), shapes)
