"""Conversations about rendered pictures as the tensors of one training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fusion_edge.benchmarks.things import pictures
from fusion_edge.benchmarks.things.codes import Codes
from fusion_edge.benchmarks.things.gallery import Gallery
from fusion_edge.benchmarks.things.initialize import CONFIG
from fusion_edge.benchmarks.things.phases import Phase
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.prompts.prompt import Prompt, PromptEncoder, PromptLayout, Turn

IGNORED = -100  # cross_entropy's label without a target
GENERIC, EMPTY = 0.1, 0.1
"""Shares of batches whose vision encoder is guided by a generic text, and by none, instead of the questions."""

Conversation = Sequence[pictures.Question]


@dataclass(frozen=True)
class Inputs:
    """What the LLM sees of the pictures."""

    query_length: int
    latent_scale: float
    """Factor of the pooled latents; at 0 all information comes from their windows."""
    image_tokens: bool
    guide: str | None = None
    """Text that guides the vision encoder; None: the questions."""


@dataclass(frozen=True)
class Batch:
    """I pictures with R conversations of the same number of questions; sequence r is about picture r // (R / I)."""

    patches: Tensor
    """``[I, 5, P, 432]`` float32 in [-1, 1]."""
    features: Tensor | None
    """``[I, 5, P, D]``: exact codes of the crops, in place of the vision tower's features."""
    conversations: list[Conversation]
    instruct: Tensor
    """``[R, T]`` token ids of the guides, padded with 0; T is 0 without a guide."""
    tokens: Tensor
    """``[R, L]`` token ids, 0 where image tokens, latents and padding are."""
    targets: Tensor
    """``[R, L]``: the next token of each row of an answer, or :data:`IGNORED`."""
    inputs: Inputs
    image_start: int
    latent_rows: Tensor
    """``[R, turns, q]``: rows of the latents, of ``L``."""
    question_rows: Tensor
    """``[R, turns]``: last row of the prompt when each question was asked, of ``L``."""


@dataclass(frozen=True)
class Encoded:
    """A conversation with the answer to its last question."""

    prompt: Prompt
    answers: tuple[tuple[int, ...], ...]
    """Token ids of each answer and its end."""


class Batches:
    """Makes batches of a gallery's pictures with new questions."""

    def __init__(self, gallery: Gallery, checkpoint: Path) -> None:
        """``checkpoint``: folder with the tokenizer."""
        self.gallery = gallery
        self.codes: Codes | None = None
        """Set while batches have exact codes in place of the vision tower's features."""
        self.tokenizer = Tokenizer.from_str(tokenizer_json(checkpoint))
        self._encoder = PromptEncoder(self.tokenizer, TEMPLATES[CONFIG.template])
        self._answer = cache(self._encode_answer)
        self._one_turn = cache(self._encode)

    def draw(self, seed: Sequence[int], phase: Phase) -> Batch:
        """Return a random batch of a phase, of questions alone or of conversations of three.

        It has a random query length and now and then another guide. The same seed gives the same batch.
        """
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(self.gallery.scenes), phase.pictures_per_step, replace=False).tolist()
        drawn = rng.random()
        guide = None
        if drawn < GENERIC + EMPTY:
            guide = str(rng.choice(pictures.GENERIC_GUIDES)) if drawn < GENERIC else ""
        query_length = int(rng.choice(CONFIG.alignment.query_lengths))
        turns = int(rng.choice(phase.turns))
        image_tokens = bool(rng.random() < phase.image_share)
        questions = phase.questions_per_picture
        scenes = [self.gallery.scenes[i] for i in chosen]
        conversations: list[Conversation] = []
        follows = rng.random() < phase.conversation_share
        for scene in scenes:
            if follows:
                conversations += [pictures.conversation(scene, rng, 3) for _ in range(questions // 3)]
            else:
                asked = pictures.ask(scene, rng, questions, phase.kinds)
                conversations += [asked[start : start + turns] for start in range(0, questions, turns)]
        return self.batch(chosen, conversations, Inputs(query_length, phase.latent_scale, image_tokens, guide))

    def batch(self, chosen: Sequence[int], conversations: list[Conversation], inputs: Inputs) -> Batch:
        """Return a batch of the chosen pictures, each with as many of the conversations, in the same order."""
        image_tokens = CONFIG.vision.patches if inputs.image_tokens else 0
        encoded = [
            self._one_turn(tuple(asked)) if len(asked) == 1 else self._encode(tuple(asked)) for asked in conversations
        ]
        layouts = [one.prompt.layout(image_tokens, inputs.query_length) for one in encoded]
        length = max(layout.length + len(one.answers[-1]) for layout, one in zip(layouts, encoded, strict=True))
        tokens = np.zeros((len(encoded), length), np.int64)
        targets = np.full((len(encoded), length), IGNORED, np.int64)
        for row, (layout, one) in enumerate(zip(layouts, encoded, strict=True)):
            _fill(tokens[row], targets[row], layout, one)
        guides = [self._guide(one.prompt, inputs.guide) for one in encoded]
        instruct = np.zeros((len(encoded), max(map(len, guides))), np.int64)
        for row, guide in enumerate(guides):
            instruct[row, : len(guide)] = guide
        rows = list(chosen)
        return Batch(
            patches=centered(torch.from_numpy(self.gallery.crops[rows])),
            features=None if self.codes is None else self.codes.features(torch.from_numpy(self.gallery.labels[rows])),
            conversations=conversations,
            instruct=torch.from_numpy(instruct),
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            inputs=inputs,
            image_start=layouts[0].image_start,
            latent_rows=torch.from_numpy(np.stack([layout.latent_positions for layout in layouts])),
            question_rows=torch.from_numpy(np.stack([layout.instruct_positions for layout in layouts])),
        )

    def _encode(self, asked: tuple[pictures.Question, ...]) -> Encoded:
        *history, last = asked
        turns = [Turn(question.text, question.answer) for question in history]
        return Encoded(self._encoder.encode(turns, last.text), tuple(self._answer(q.answer) for q in asked))

    def _guide(self, prompt: Prompt, guide: str | None) -> npt.NDArray[np.int64]:
        return prompt.instruct_ids if guide is None else self._encoder.encode_start(guide).instruct_ids

    def _encode_answer(self, answer: str) -> tuple[int, ...]:
        """Return the token ids of an answer and its end, as tokenized after the prompt."""
        template = TEMPLATES[CONFIG.template]
        start, end = template.answer_start, template.answer_end
        before, ids = (
            self.tokenizer.encode(text, add_special_tokens=False).ids for text in (start, start + answer + end)
        )
        return tuple(ids[len(before) :])


def centered(crops: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return crops.float() / 127.5 - 1


def _fill(
    tokens: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], layout: PromptLayout, encoded: Encoded
) -> None:
    """Write a sequence's tokens ``[L]`` and the targets of all its answers ``[L]``."""
    tokens[layout.text_positions] = layout.text_ids
    last = encoded.answers[-1]
    tokens[layout.length : layout.length + len(last)] = last
    for row, answer in zip(layout.instruct_positions, encoded.answers, strict=True):
        targets[row : row + len(answer)] = answer
