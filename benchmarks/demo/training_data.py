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
from torch.nn.utils.rnn import pad_sequence

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.demo.codes import Codes
from fusion_edge.benchmarks.demo.gallery import Gallery
from fusion_edge.benchmarks.demo.initialize import CONFIG
from fusion_edge.benchmarks.demo.phases import Phase
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
    """I pictures in R sequences of the same number of questions; sequence r is about picture r // (R / I).

    The conversations of a sequence follow the same image tokens and do not see each other, as if each were alone.
    """

    patches: Tensor
    """``[I, 5, P, 432]`` float32 in [-1, 1]."""
    features: Tensor | None
    """``[I, 5, P, D]``: exact codes of the crops, in place of the vision tower's features."""
    sequences: Sequence[Sequence[Conversation]]
    instruct: Tensor
    """``[R, T]`` token ids of the guides, padded with 0; T is 0 without a guide."""
    tokens: Tensor
    """``[R, L]`` token ids, 0 where image tokens, latents and padding are."""
    targets: Tensor
    """``[R, L]``: the next token of each row of an answer, or :data:`IGNORED`."""
    positions: Tensor
    """``[R, L]``: positions of the rows in their conversations."""
    attended: Tensor
    """``[R, L, L]`` bool: whether row i attends to row j."""
    inputs: Inputs
    image_start: int
    latent_rows: Tensor
    """``[R, Q, q]``: rows of the latents of each question, of ``L``."""
    question_rows: Tensor
    """``[R, Q]``: last row of the prompt when each question was asked, of ``L``."""


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
        packed = int(rng.choice(phase.packed))
        image_tokens = bool(rng.random() < phase.image_share)
        questions = phase.questions_per_picture
        scenes = [self.gallery.scenes[i] for i in chosen]
        sequences: list[Sequence[Conversation]] = []
        follows = rng.random() < phase.conversation_share
        for scene in scenes:
            if follows:
                conversations = [pictures.conversation(scene, rng, 3) for _ in range(questions // 3)]
            else:
                conversations = [[question] for question in pictures.ask(scene, rng, questions, phase.kinds)]
            sequences += [conversations[start : start + packed] for start in range(0, len(conversations), packed)]
        return self.batch(chosen, sequences, Inputs(query_length, phase.latent_scale, image_tokens, guide))

    def batch(self, chosen: Sequence[int], sequences: Sequence[Sequence[Conversation]], inputs: Inputs) -> Batch:
        """Return a batch of the chosen pictures, each with as many of the sequences, in the same order."""
        image_tokens = CONFIG.vision.patches if inputs.image_tokens else 0
        encoded = [[self._encoded(tuple(asked)) for asked in conversations] for conversations in sequences]
        packed = [_pack(conversations, image_tokens, inputs.query_length) for conversations in encoded]
        tokens, positions, parts = (
            _padded([rows[name] for rows in packed], 0) for name in ("tokens", "positions", "parts")
        )
        targets = _padded([rows["targets"] for rows in packed], IGNORED)
        guides = [
            np.concatenate([one.prompt.instruct_ids for one in conversations])
            if inputs.guide is None
            else self._encoder.encode_start(inputs.guide).instruct_ids
            for conversations in encoded
        ]
        start = encoded[0][0].prompt.layout(image_tokens, inputs.query_length).image_start
        rows = list(chosen)
        return Batch(
            patches=centered(torch.from_numpy(self.gallery.crops[rows])),
            features=None if self.codes is None else self.codes.features(torch.from_numpy(self.gallery.labels[rows])),
            sequences=sequences,
            instruct=_padded(guides, 0),
            tokens=tokens,
            targets=targets,
            positions=positions,
            attended=_attended(parts),
            inputs=inputs,
            image_start=start,
            latent_rows=torch.from_numpy(np.stack([rows["latents"] for rows in packed])),
            question_rows=torch.from_numpy(np.stack([rows["questions"] for rows in packed])),
        )

    def _encoded(self, asked: tuple[pictures.Question, ...]) -> Encoded:
        return self._one_turn(asked) if len(asked) == 1 else self._encode(asked)

    def _encode(self, asked: tuple[pictures.Question, ...]) -> Encoded:
        *history, last = asked
        turns = [Turn(question.text, question.answer) for question in history]
        return Encoded(self._encoder.encode(turns, last.text), tuple(self._answer(q.answer) for q in asked))

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


def _pack(conversations: Sequence[Encoded], image_tokens: int, query_length: int) -> dict[str, npt.NDArray[np.int64]]:
    """Return the rows of a sequence: those up to the image tokens, then the others of each conversation.

    ``tokens``, ``targets``, ``positions`` and ``parts`` are ``[L]``; a part is 0 for rows of all conversations, and
    otherwise the number of the conversation, from 1. ``latents`` ``[Q, q]`` and ``questions`` ``[Q]`` are rows.
    """
    rows: dict[str, list[npt.NDArray[np.int64]]] = {
        name: [] for name in ("tokens", "targets", "positions", "parts", "latents", "questions")
    }
    length = 0
    for number, one in enumerate(conversations, 1):
        layout = one.prompt.layout(image_tokens, query_length)
        tokens, targets = _alone(layout, one)
        first = layout.image_end if number > 1 else 0
        positions = np.arange(first, len(tokens))
        moved = length - first
        length += len(positions)
        for name, values in (
            ("tokens", tokens[first:]),
            ("targets", targets[first:]),
            ("positions", positions),
            ("parts", np.where(positions < layout.image_end, 0, number)),
            ("latents", layout.latent_positions + moved),
            ("questions", layout.instruct_positions + moved),
        ):
            rows[name].append(values)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _alone(layout: PromptLayout, encoded: Encoded) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return a conversation's tokens ``[L]`` and the targets of all its answers ``[L]``."""
    last = encoded.answers[-1]
    tokens = np.zeros(layout.length + len(last), np.int64)
    targets = np.full(len(tokens), IGNORED, np.int64)
    tokens[layout.text_positions] = layout.text_ids
    tokens[layout.length :] = last
    for row, answer in zip(layout.instruct_positions, encoded.answers, strict=True):
        targets[row : row + len(answer)] = answer
    return tokens, targets


def _padded(rows: Sequence[npt.NDArray[np.int64]], filler: int) -> Tensor:
    """Return arrays ``[L]`` of different lengths as one tensor ``[R, L]``."""
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=filler)


def _attended(parts: Tensor) -> Tensor:
    """Return the attention mask ``[R, L, L]`` of parts ``[R, L]``."""
    of_row, of_key = parts.unsqueeze(2), parts.unsqueeze(1)
    return ((of_key == 0) | (of_key == of_row)).tril()
