"""Conversation templates, and a conversation as token ids and positions (FUSION.md sections 2 and 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fusion_edge.runtime.errors import UsageError

IMAGE_MARKER = "<image>"
LATENT_MARKER = "<latent_image>"
VISION_START = "<vision_start>"
VISION_END = "<vision_end>"
MARKER_IDS: Mapping[str, int] = MappingProxyType({IMAGE_MARKER: -200, LATENT_MARKER: -300})
"""What stands for a marker among token ids."""


@dataclass(frozen=True)
class Template:
    """The text around a conversation's questions and answers."""

    system: str
    question_start: str
    question_end: str
    answer_start: str
    answer_end: str


TEMPLATES: Mapping[str, Template] = MappingProxyType({
    "phi_3": Template(
        system="<|system|>\nYou are a helpful AI assistant.<|end|>",
        question_start="\n<|user|>\n",
        question_end="<|end|>",
        answer_start="\n<|assistant|>\n",
        answer_end="<|end|>",
    ),
    "llama_3": Template(
        system="<|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful, highly intelligent language and vision assistant. "
        "You are able to understand the visual content that the user provides, and assist the user with a "
        "variety of tasks using natural language. Whenever an image is present in the conversation, very "
        "carefully examine it and consider its content when formulating your response.<|eot_id|>",
        question_start="<|start_header_id|>user<|end_header_id|>\n\n",
        question_end="<|eot_id|>",
        answer_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_end="<|eot_id|>",
    ),
})
"""By the name in ``FusionConfig.template``."""


@dataclass(frozen=True)
class Turn:
    """A question that has been answered."""

    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything goes in the LLM's input. All arrays are int64."""

    length: int
    """Rows of the input."""
    text_ids: npt.NDArray[np.int64]
    """``[T]`` token ids."""
    text_positions: npt.NDArray[np.int64]
    """``[T]``: the row of each text token."""
    image_start: int
    """First of the image tokens' consecutive rows."""
    latent_positions: npt.NDArray[np.int64]
    """``[Q, q]``: the rows of the latents in front of each question."""
    instruct_positions: npt.NDArray[np.int64]
    """``[Q]``: the last row of the prompt as it stood when each question was asked."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation of Q questions as token ids. All arrays are int64 ``[n]``."""

    token_ids: npt.NDArray[np.int64]
    """Text tokens, with ``MARKER_IDS`` where image tokens and latents go: Q + 1 markers."""
    instruct_ids: npt.NDArray[np.int64]
    """The questions alone, for the text-guided vision encoder (FUSION.md section 2)."""
    instruct_indices: npt.NDArray[np.int64]
    """``[Q]``: index in ``token_ids`` of the last token of the prompt as it stood at each question."""

    def layout(self, image_tokens: int, query_length: int) -> Layout:
        """Positions once every marker is as wide as what it stands for.

        The first marker becomes ``image_tokens`` rows whichever it is, every later one ``query_length`` rows
        (FUSION.md section 4: the released weights were trained so).
        """
        is_marker = self.token_ids < 0
        image_marker, *latent_markers = np.flatnonzero(is_marker)
        widths = np.where(is_marker, query_length, 1)
        widths[image_marker] = image_tokens
        ends = np.cumsum(widths)
        starts = ends - widths
        return Layout(
            length=int(ends[-1]),
            text_ids=self.token_ids[~is_marker],
            text_positions=starts[~is_marker],
            image_start=int(starts[image_marker]),
            latent_positions=starts[latent_markers][:, None] + np.arange(query_length),
            instruct_positions=starts[self.instruct_indices],
        )


def render_prompt(template: Template, history: Sequence[Turn], question: str) -> str:
    """The conversation's text up to where the answer to ``question`` begins, with its markers.

    Image markers within questions and answers are removed, and questions stripped: they are data, and may
    not claim a place for an image. Special tokens within them stay, as in the released code. Raises
    ``UsageError`` for a question or answer that is no valid text, or a question with nothing in it.
    """
    text = template.system
    for number, asked in enumerate(_questions(history, question)):
        text += f"{template.question_start}{VISION_START}{LATENT_MARKER}{VISION_END}"
        if number == 0:
            text += f"{VISION_START}{IMAGE_MARKER}{VISION_END}\n"
        text += f"{asked}{template.question_end}{template.answer_start}"
        if number < len(history):
            answer = _valid_text(history[number].answer, "An answer in the history")
            text += _without(answer, *MARKER_IDS) + template.answer_end
    return text


def encode_prompt(tokenizer: Tokenizer, template: Template, history: Sequence[Turn], question: str) -> Prompt:
    """Tokenize a conversation as the released code does. Raises ``UsageError`` as ``render_prompt`` does."""
    questions = _questions(history, question)
    # Tokenized with its answer behind it, the end of an earlier prompt may split differently; what counts
    # is its length when it was asked.
    asked = [
        _encode(tokenizer, render_prompt(template, history[:number], asked_then))
        for number, asked_then in enumerate(questions)
    ]
    instruct = _without("".join(questions), *MARKER_IDS, VISION_START, VISION_END).strip()
    return Prompt(
        token_ids=np.array(asked[-1], np.int64),
        instruct_ids=np.array(_encode(tokenizer, instruct), np.int64),
        instruct_indices=np.array([len(ids) - 1 for ids in asked], np.int64),
    )


def _questions(history: Sequence[Turn], question: str) -> list[str]:
    if not isinstance(history, Sequence) or not all(isinstance(turn, Turn) for turn in history):
        raise UsageError(f"The history is {repr(history)[:80]}; expected a list of Turn(question, answer).")
    return [_clean_question(text) for text in (*(turn.question for turn in history), question)]


def _clean_question(question: str) -> str:
    text = _without(_valid_text(question, "The question"), *MARKER_IDS).strip()
    if not _without(text, VISION_START, VISION_END).strip():
        raise UsageError("The question is empty; ask something about the image.")
    return text


def _valid_text(text: str, name: str) -> str:
    if not isinstance(text, str):
        raise UsageError(f"{name} is of type {type(text).__name__}; expected a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is no valid Unicode text: character {error.start} is half of a surrogate pair."
        ) from error
    return text


def _without(text: str, *markers: str) -> str:
    """``text`` with no marker left in it, not even one that a removal brought together."""
    pattern = re.compile("|".join(map(re.escape, markers)))
    while pattern.search(text):
        text = pattern.sub("", text)
    return text


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids piece by piece; what the tokenizer puts in front (BOS, or nothing) only at the very front."""
    ids: list[int] = tokenizer.encode("").ids
    for piece in re.split(f"({'|'.join(map(re.escape, MARKER_IDS))})", text):
        marker = MARKER_IDS.get(piece)
        ids += tokenizer.encode(piece, add_special_tokens=False).ids if marker is None else [marker]
    return ids
