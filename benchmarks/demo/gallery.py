"""Rendered pictures of the demo's training, as the five crops that the vision tower sees."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.codes import patch_labels
from fusion_edge.benchmarks.demo.initialize import CONFIG
from fusion_edge.runtime.images.preprocessing import cut_crops

REDUCTION = 4
"""Training uses averages of 4 x 4 pixels, so learned patch kernels are constant on such squares."""
KERNEL = CONFIG.vision.patch_size // REDUCTION  # averages per side of a patch
PART = 250  # pictures that a process renders at once
FIRST_SEED = 1000  # of a gallery's parts; evaluation and calibration use lower ones


@dataclass(frozen=True)
class Gallery:
    """Reduced crops ``[N, 5, P, 3 * 12 * 12]``, labels of their patches ``[N, 5, P]``, and the scenes."""

    crops: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    scenes: list[pictures.Scene]

    @classmethod
    def render(cls, split: str, seed: int, count: int, processes: int = 1) -> Gallery:
        """Render ``count`` pictures of a split; the number of processes does not change them."""
        parts = [(split, FIRST_SEED * (seed + 1) + i, min(PART, count - PART * i)) for i in range(-(-count // PART))]
        crops, labels, scenes = [], [], []
        for part in _each(parts, processes):
            crops.append(part.crops)
            labels.append(part.labels)
            scenes += part.scenes
        return cls(np.concatenate(crops), np.concatenate(labels), scenes)


def reduce_crops(picture: pictures.Pixels) -> npt.NDArray[np.uint8]:
    """Return the five crops (docs/fusion-model.md section 1) as patches of averages: ``[5, P, 3 * 12 * 12]``."""
    grid = CONFIG.vision.grid
    crops = cut_crops(Image.fromarray(picture))
    reduced: list[npt.NDArray[np.uint8]] = [np.asarray(Image.fromarray(crop).reduce(REDUCTION)) for crop in crops]
    blocks: npt.NDArray[np.uint8] = np.stack(reduced).reshape(len(reduced), grid, KERNEL, grid, KERNEL, 3)
    patches: npt.NDArray[np.uint8] = blocks.transpose(0, 1, 3, 5, 2, 4).reshape(len(reduced), grid * grid, -1)
    return patches


def _each(parts: list[tuple[str, int, int]], processes: int) -> Iterator[Gallery]:
    if processes == 1:
        yield from map(_render, parts)
        return
    # A fork would inherit torch's threads, which are not there after it.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_render, parts)


def _render(part: tuple[str, int, int]) -> Gallery:
    split, seed, count = part
    shown = list(itertools.islice(pictures.scenes(split, seed), count))
    scenes = [scene for scene, _ in shown]
    crops = np.stack([reduce_crops(picture) for _, picture in shown])
    return Gallery(crops, np.stack([patch_labels(scene) for scene in scenes]), scenes)
