"""Pictures and questions as the tensors of one training step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.initialize import CONFIG
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.images.preprocessing import cut_crops
from fusion_edge.runtime.prompts.prompt import Prompt, encode_prompt

REDUCTION = 6
"""Training uses averages of 6 x 6 pixels, so learned patch kernels are constant on such squares."""
KERNEL = CONFIG.vision.patch_size // REDUCTION  # averages per side of a patch
IGNORED = -100  # cross_entropy's label without a target


def reduce_crops(picture: pictures.Pixels) -> npt.NDArray[np.uint8]:
    """Return the five crops (docs/fusion-model.md section 1) as patches of averages: ``[5, patches, 3 * 8 * 8]``."""
    grid = CONFIG.vision.grid
    crops = cut_crops(Image.fromarray(picture))
    reduced: list[npt.NDArray[np.uint8]] = [np.asarray(Image.fromarray(crop).reduce(REDUCTION)) for crop in crops]
    blocks: npt.NDArray[np.uint8] = np.stack(reduced).reshape(len(reduced), grid, KERNEL, grid, KERNEL, 3)
    patches: npt.NDArray[np.uint8] = blocks.transpose(0, 1, 3, 5, 2, 4).reshape(len(reduced), grid * grid, -1)
    return patches


def centered(crops: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return crops.float() / 127.5 - 1


@dataclass(frozen=True)
class Gallery:
    """Rendered pictures: reduced crops ``[N, 5, patches, 192]`` and their shapes."""

    crops: npt.NDArray[np.uint8]
    shapes: list[list[pictures.Shape]]

    @classmethod
    def render(cls, split: str, seed: int, count: int) -> Gallery:
        """Render the first ``count`` pictures of a split and seed."""
        crops, shapes = [], []
        for shown, picture in itertools.islice(pictures.scenes(split, seed), count):
            shapes.append(shown)
            crops.append(reduce_crops(picture))
        return cls(np.stack(crops), shapes)


@dataclass(frozen=True)
class Batch:
    """I pictures with K questions each; question r of R = I * K is about picture r // K."""

    patches: Tensor
    """``[I, 5, P, 192]`` float32 in [-1, 1]."""
    features: Tensor | None
    """``[I, 4, P, D]``: projected features of the global crops, with a frozen vision tower."""
    questions: list[pictures.Question]
    instruct: Tensor
    """``[R, T]`` token ids of the questions alone, padded with 0."""
    tokens: Tensor
    """``[R, L]`` token ids, 0 where image tokens, latents and padding are."""
    targets: Tensor
    """``[R, L]``: the next token of each row, or :data:`IGNORED`."""
    query_length: int
    latent_scale: float
    image_tokens: int
    """P, or 0 without the local crop."""
    image_start: int
    latent_start: int
    question_rows: Tensor
    """``[R]``: last row of each prompt."""


class Batches:
    """Makes batches of a gallery's pictures with new questions."""

    def __init__(self, gallery: Gallery, checkpoint: Path) -> None:
        """``checkpoint``: folder with the tokenizer."""
        self.gallery = gallery
        self.features: Tensor | None = None
        """``[N, 4, P, D]`` of the gallery's global crops; set while the vision tower is frozen."""
        self._tokenizer = Tokenizer.from_str(tokenizer_json(checkpoint))
        self._prompt = cache(self._encode)

    def draw(
        self, seed: Sequence[int], images: int, questions: int, latent_scale: float, with_image_tokens: bool
    ) -> Batch:
        """Return a random batch with lessons and a random query length; the same seed gives the same batch."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(self.gallery.shapes), images, replace=False).tolist()
        query_length = int(rng.choice(CONFIG.alignment.query_lengths))
        return self.batch(chosen, rng, questions, query_length, latent_scale, with_image_tokens, lessons=True)

    def batch(
        self,
        chosen: Sequence[int],
        rng: np.random.Generator,
        questions: int,
        query_length: int,
        latent_scale: float = 1.0,
        with_image_tokens: bool = True,
        lessons: bool = False,
    ) -> Batch:
        """Return a batch of the chosen pictures with ``questions`` questions each."""
        image_tokens = CONFIG.vision.patches if with_image_tokens else 0
        asked = [q for i in chosen for q in pictures.ask(self.gallery.shapes[i], rng, questions, lessons)]
        prompts = [self._prompt(question.text) for question in asked]
        layouts = [prompt.layout(image_tokens, query_length) for prompt in prompts]
        answers = [self._answer(question) for question in asked]
        length = max(layout.length + len(ids) for layout, ids in zip(layouts, answers, strict=True))
        tokens = np.zeros((len(asked), length), np.int64)
        targets = np.full((len(asked), length), IGNORED, np.int64)
        for row, (layout, ids) in enumerate(zip(layouts, answers, strict=True)):
            tokens[row, layout.text_positions] = layout.text_ids
            tokens[row, layout.length : layout.length + len(ids)] = ids
            targets[row, layout.length - 1 : layout.length - 1 + len(ids)] = ids
        instruct = np.zeros((len(asked), max(len(prompt.instruct_ids) for prompt in prompts)), np.int64)
        for row, prompt in enumerate(prompts):
            instruct[row, : len(prompt.instruct_ids)] = prompt.instruct_ids
        return Batch(
            patches=centered(torch.from_numpy(self.gallery.crops[list(chosen)])),
            features=None if self.features is None else self.features[list(chosen)].float(),
            questions=asked,
            instruct=torch.from_numpy(instruct),
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            query_length=query_length,
            latent_scale=latent_scale,
            image_tokens=image_tokens,
            image_start=layouts[0].image_start,
            latent_start=int(layouts[0].latent_positions[0, 0]),
            question_rows=torch.tensor([int(layout.instruct_positions[0]) for layout in layouts]),
        )

    def _encode(self, question: str) -> Prompt:
        return encode_prompt(self._tokenizer, TEMPLATES[CONFIG.template], [], question)

    def _answer(self, question: pictures.Question) -> list[int]:
        """Return the token ids of the answer and its end, as tokenized after the prompt."""
        template = TEMPLATES[CONFIG.template]
        start, end = template.answer_start, template.answer_end
        before, ids = (
            self._tokenizer.encode(text, add_special_tokens=False).ids
            for text in (start, start + question.answer + end)
        )
        return list(ids[len(before) :])
