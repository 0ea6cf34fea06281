"""Target features of the demo's vision tower: a code for what covers a patch.

A released model has a SigLIP tower, which was trained with texts: the features of a thing are near those of its name.
The demo's tower learns sparse random codes of kinds, categories, backgrounds and places, and the LLM's embeddings of
their names start as questions for the same codes. So reading a feature is copying it, which an LLM learns once. Codes
are nonnegative and nearly all of their values are 0, so the maximum over several patches still holds all of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.initialize import CONFIG, HEAD, INPUT
from fusion_edge.benchmarks.demo.subspaces import ASKS_THING, ASKS_WORD, THING, WORD, asked, mark, random_codes
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS
from fusion_edge.runtime.bundle.templates import TEMPLATES

KINDS, CATEGORIES, BACKGROUNDS = tuple(pictures.THINGS), tuple(pictures.CATEGORIES), pictures.BACKGROUNDS
CATEGORY_SCALE, PLACE_SCALE, HEAD_SCALE = 0.5, 1.0, 0.125
PLACE_ANCHORS = 5  # rows, or columns, with a code of their own; the others are between two
MARGIN = 0.2  # a thing covers a patch whose center is this part of a patch outside of it, too


@dataclass(frozen=True)
class Codes:
    """Codes ``[..., D]`` of everything that a patch can show."""

    kinds: Tensor
    """``[96, D]``"""
    categories: Tensor
    """``[9, D]``"""
    backgrounds: Tensor
    """``[8, D]``"""
    rows: Tensor
    """``[grid, D]`` of the rows of patches: similar for neighbors."""
    columns: Tensor
    """``[grid, D]``"""

    @classmethod
    def draw(cls, seed: int) -> Codes:
        """Draw random codes."""
        generator = torch.Generator().manual_seed(seed)
        kinds, categories, backgrounds, rows, columns = (
            random_codes(count, generator)
            for count in (len(KINDS), len(CATEGORIES), len(BACKGROUNDS), PLACE_ANCHORS, PLACE_ANCHORS)
        )
        grid = CONFIG.vision.grid
        return cls(kinds, categories, backgrounds, _between(rows, grid), _between(columns, grid))

    @property
    def places(self) -> Tensor:
        """Codes ``[P, D]`` of where a patch is."""
        return PLACE_SCALE * (self.rows[:, None] + self.columns).flatten(0, 1)

    @property
    def contents(self) -> Tensor:
        """Codes ``[8 + 96, D]`` of what a patch shows: a background, or a thing of a kind and its category."""
        belongs = [CATEGORIES.index(kind.category) for kind in pictures.THINGS.values()]
        things = self.kinds + CATEGORY_SCALE * self.categories[belongs] + mark(THING)
        return torch.cat([CATEGORY_SCALE * self.backgrounds, things])

    def features(self, labels: Tensor) -> Tensor:
        """Return what a perfect vision tower would compute for crops: bfloat16 ``[...,P,D]`` of labels ``[...,P]``."""
        table = self.contents[:, None] + self.places
        return table.to(torch.bfloat16)[labels, torch.arange(labels.shape[-1])]

    def start_names(self, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
        """Start names that are one token, in place: embeddings ask for their codes, ``lm_head`` rows recognize them."""
        names = dict(zip(KINDS, self.kinds, strict=True))
        names |= {pictures.THINGS[kind].plural: code for kind, code in names.items()}
        names |= dict(zip(CATEGORIES, self.categories, strict=True))
        names |= dict(zip(BACKGROUNDS, self.backgrounds, strict=True))
        names |= self._place_words()
        for name, code in names.items():
            for token in _tokens(tokenizer, name):
                tensors[INPUT][token] = asked(code) + mark(WORD)
                tensors[HEAD][token] = HEAD_SCALE * code
        # The last token of a prompt looks for words of the question, and for things.
        [*_, last] = tokenizer.encode(TEMPLATES[CONFIG.template].answer_start, add_special_tokens=False).ids
        tensors[INPUT][last] = mark(ASKS_THING) + mark(ASKS_WORD)

    def _place_words(self) -> dict[str, Tensor]:
        """Return codes ``[D]`` of the words of places, as long as those of kinds. ``middle`` is of rows and columns."""
        top, middle, bottom = _thirds(self.rows)
        left, center, right = _thirds(self.columns)
        words = {"top": top, "bottom": bottom, "left": left, "right": right, "middle": middle + center}
        length = self.kinds[0].norm()
        return {word: code * length / code.norm() for word, code in words.items()}


def patch_labels(scene: pictures.Scene) -> npt.NDArray[np.int64]:
    """Return what each patch of each crop shows, as an index into :attr:`Codes.contents`: int64 ``[5, P]``."""
    grid = CONFIG.vision.grid
    fine, coarse = _map(scene, 2 * grid), _map(scene, grid)
    crops = fine.reshape(2, grid, 2, grid).swapaxes(1, 2).reshape(GLOBAL_CROPS, grid * grid)
    return np.concatenate([crops, coarse.reshape(1, grid * grid)])


def _map(scene: pictures.Scene, side: int) -> npt.NDArray[np.int64]:
    """Return labels ``[side, side]``; a patch that several things cover shows the one it is deepest in."""
    labels = np.full((side, side), BACKGROUNDS.index(scene.background), np.int64)
    patch = pictures.PICTURE_SIZE / side
    centers = (np.arange(side) + 0.5) * patch
    deepest = np.ones((side, side))
    for thing in scene:
        x, y = thing.center
        depth = np.hypot(centers[:, None] - y, centers[None, :] - x) / (thing.radius + MARGIN * patch)
        covered = depth < deepest
        labels[covered] = len(BACKGROUNDS) + KINDS.index(thing.kind)
        deepest = np.minimum(deepest, depth)
    return labels


def _between(anchors: Tensor, size: int) -> Tensor:
    """Return ``size`` codes that go evenly from the first anchor to the last: ``[size, D]``."""
    positions = torch.linspace(0, len(anchors) - 1, size)
    weights = (1 - (positions[:, None] - torch.arange(len(anchors))).abs()).clamp(min=0)
    return weights @ anchors


def _thirds(codes: Tensor) -> list[Tensor]:
    """Return the mean code ``[D]`` of each third of ``[grid, D]``; a code on a border counts for both sides."""
    place = (torch.arange(len(codes)) + 0.5) * pictures.GRID / len(codes)
    return [codes[(place - third - 0.5).abs() <= 0.6].mean(0) for third in range(pictures.GRID)]


def _tokens(tokenizer: Tokenizer, name: str) -> Iterator[int]:
    """Yield the token of a name after a line break, and after a space, where it is one token."""
    for before in ("\n", "the"):
        start = tokenizer.encode(before, add_special_tokens=False).ids
        text = f"\n{name}" if before == "\n" else f"the {name}"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) == len(start) + 1:
            yield ids[-1]
