"""A conversation as token ids and positions (docs/fusion-model.md sections 2 and 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.bundle.templates import Template
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.tokenization.text_encoder import TextEncoder, any_of, is_empty

MAX_WHITESPACE = 1000
"""Limit of whitespace around an answer in the history. Next to a control token it may add no tokens."""
IMAGE_MARKER = "<image>"
LATENT_MARKER = "<latent_image>"
VISION_START = "<vision_start>"
VISION_END = "<vision_end>"
MARKER_IDS: Mapping[str, int] = MappingProxyType({IMAGE_MARKER: -200, LATENT_MARKER: -300})
"""Ids of the image markers among token ids."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    """The question."""
    answer: str
    """The complete answer."""


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """Rows of the LLM's input. All arrays are int64."""

    length: int
    """Number of rows."""
    text_ids: npt.NDArray[np.int64]
    """``[T]``: ids of the text tokens."""
    text_positions: npt.NDArray[np.int64]
    """``[T]``: row of each text token."""
    image_start: int
    """First row of the image tokens, which are consecutive."""
    image_end: int
    """Row after the image tokens."""
    latent_positions: npt.NDArray[np.int64]
    """``[Q,q]``: rows of the latents before each question."""
    instruct_positions: npt.NDArray[np.int64]
    """``[Q]``: last row of the prompt when each question was asked."""

    def after_image(self) -> PromptLayout:
        """Return the rows after the image tokens, which stay where they are if the rows before do not change."""
        first = self.image_end
        is_after = self.text_positions >= first
        return PromptLayout(
            length=self.length - first,
            text_ids=self.text_ids[is_after],
            text_positions=self.text_positions[is_after] - first,
            image_start=0,
            image_end=0,
            latent_positions=self.latent_positions - first,
            instruct_positions=self.instruct_positions - first,
        )


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation of Q questions as token ids. All arrays are int64 ``[n]``.

    With Q = 0 it is the start of every prompt. Rows up to the image tokens depend on the image and ``instruct_ids``
    alone.
    """

    token_ids: npt.NDArray[np.int64]
    """Text tokens, with Q + 1 markers (:data:`MARKER_IDS`) in place of image tokens and latents."""
    instruct_ids: npt.NDArray[np.int64]
    """Tokens of the questions, which guide the vision encoder (docs/fusion-model.md section 2)."""
    instruct_indices: npt.NDArray[np.int64]
    """``[Q]``: index in ``token_ids`` of the last token of the prompt when each question was asked."""

    def layout(self, image_tokens: int, query_length: int) -> PromptLayout:
        """Replace the markers by rows and return the positions.

        The first marker becomes ``image_tokens`` rows, every other one ``query_length`` rows, as in the training of the
        released weights (docs/fusion-model.md section 4).
        """
        is_marker = self.token_ids < 0
        image_marker, *latent_markers = np.flatnonzero(is_marker)
        widths = np.where(is_marker, query_length, 1)
        widths[image_marker] = image_tokens
        ends = np.cumsum(widths)
        starts = ends - widths
        return PromptLayout(
            length=int(ends[-1]),
            text_ids=self.token_ids[~is_marker],
            text_positions=starts[~is_marker],
            image_start=int(starts[image_marker]),
            image_end=int(ends[image_marker]),
            latent_positions=starts[latent_markers][:, None] + np.arange(query_length),
            instruct_positions=starts[self.instruct_indices],
        )


@dataclass(frozen=True)
class ContextBudget:
    """Tokens that a context has for a prompt."""

    capacity: int
    """Size of the context in tokens."""
    image_tokens: int
    query_length: int
    """Latents per question."""

    def check(self, prompt: Prompt) -> None:
        """Raise :class:`FusionError` if a prompt leaves no token for the answer."""
        length = prompt.layout(self.image_tokens, self.query_length).length
        if length >= self.capacity:
            raise self._too_long(str(length))

    def check_guide(self, prompt: Prompt) -> None:
        """Raise :class:`FusionError` if a guide is longer than any question can be."""
        room = self.capacity - prompt.layout(self.image_tokens, self.query_length).length
        if (length := len(prompt.instruct_ids)) > room:
            raise FusionError(f"The guide has {length} tokens, and a question at most {room}; shorten it.")

    def left(self, token_ids: Sequence[int]) -> int:
        """Return the tokens left after a prompt's first ids. Raise :class:`FusionError` if they exceed the context."""
        least = len(token_ids) + self.image_tokens  # a marker stands for at least one token
        if least > self.capacity:
            raise self._too_long(f"at least {least - 1}")
        return self.capacity - least

    def check_text(self, text: str, encoder: TextEncoder, left: int) -> None:
        """Raise :class:`FusionError` if a text needs more than ``left`` tokens, without tokenizing it."""
        if len(text) > left and (least := len(text) // encoder.longest_token) > left:
            raise self._too_long(f"at least {self.capacity - left - 1 + least}")

    def _too_long(self, length: str) -> FusionError:
        return FusionError(
            f"The prompt has {length} tokens ({self.image_tokens} of them image tokens), and the context holds "
            f"{self.capacity} with the answer; ask a shorter question, drop history, or export with fewer "
            "--image-tokens or a larger --max-context (for TensorRT also an option of fusion-build)."
        )


class PromptEncoder:
    """Tokenizes conversations as the released code does. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self._encoder = TextEncoder(tokenizer)
        self._template = template
        self._ignored = any_of((*self._encoder.special_tokens, *MARKER_IDS, VISION_START, VISION_END))

    def encode(
        self,
        history: Sequence[Turn],
        question: str,
        *,
        control_tokens: bool = False,
        budget: ContextBudget | None = None,
    ) -> Prompt:
        """Tokenize a conversation.

        Spellings of control tokens and image markers in questions and answers are text. With ``control_tokens``, as in
        the released code, they become control tokens, and image markers are removed: user text may not place an image.

        Raises ``UsageError`` for an invalid history, invalid Unicode or an empty question, and ``FusionError`` for a
        prompt that exceeds ``budget``, before tokenizing all of it.
        """
        turns = check_history(history)
        template, encoder = self._template, self._encoder
        ids = self._start()
        asked_at: list[int] = []
        questions = ""
        for number, turn in enumerate((*turns, Turn(question, ""))):
            ids.append(MARKER_IDS[LATENT_MARKER])
            start = VISION_END
            if number == 0:
                ids += [*encoder.plain(f"{VISION_END}{VISION_START}"), MARKER_IDS[IMAGE_MARKER]]
                start = f"{VISION_END}\n"
            asked = self._question(turn.question, control_tokens, budget, ids)
            questions += asked
            piece = (start, asked, f"{template.question_end}{template.answer_start}")
            # The answer may change how the end of the prompt is tokenized. The position is that without the answer.
            as_asked = encoder.encode(piece, control_tokens)
            asked_at.append(len(ids) + len(as_asked) - 1)
            if number == len(turns):
                ids += as_asked
            else:
                answer = self._answer(turn.answer, control_tokens, budget, ids)
                ids += encoder.encode((*piece, answer, f"{template.answer_end}{self._question_start}"), control_tokens)
        if control_tokens:
            questions = _without(questions, *MARKER_IDS, VISION_START, VISION_END)
        return self._prompt(ids, questions, asked_at, control_tokens, budget)

    def encode_start(self, guide: str, *, budget: ContextBudget | None = None) -> Prompt:
        """Tokenize the start of every prompt, up to the image tokens, and the text that guides the vision encoder.

        An empty guide is valid. Raises as :meth:`encode`.
        """
        ids = self._start()
        text = self._valid_text(guide, "The guide", budget, ids).strip()
        prompt = self._prompt([*ids, MARKER_IDS[LATENT_MARKER]], text, [], False, budget)
        if budget is not None:
            budget.check_guide(prompt)
        return prompt

    @property
    def _question_start(self) -> str:
        """Text before the latents of a question."""
        return f"{self._template.question_start}{VISION_START}"

    def _start(self) -> list[int]:
        """Return the tokens before the first marker."""
        return [*self._encoder.beginning(), *self._encoder.plain(self._template.system + self._question_start)]

    def _prompt(
        self, ids: list[int], questions: str, asked_at: list[int], control_tokens: bool, budget: ContextBudget | None
    ) -> Prompt:
        encoder = self._encoder
        instruct = [*encoder.beginning(), *encoder.encode(("", questions.strip()), control_tokens)]
        prompt = Prompt(*(np.array(values, np.int64) for values in (ids, instruct, asked_at)))
        if budget is not None:
            budget.check(prompt)
        return prompt

    def encode_choices(
        self,
        history: Sequence[Turn],
        question: str,
        choices: Sequence[str],
        *,
        control_tokens: bool = False,
        room: int,
    ) -> list[tuple[int, ...]]:
        """Tokenize choices of an answer to the last question, as answers in the history of the next question are.

        Whitespace around a choice is dropped, as in a model's answers.

        Raises ``UsageError`` for a choice that is not valid Unicode, has no visible character, or changes the tokens
        of the prompt, and ``FusionError`` for one with more than ``room`` tokens, before tokenizing it.
        """
        template, encoder = self._template, self._encoder
        start = VISION_END if history else f"{VISION_END}\n"
        asked = self._question(question, control_tokens, None, ())
        piece = (start, asked, f"{template.question_end}{template.answer_start}")
        prompt, end = encoder.encode(piece, control_tokens), encoder.plain(template.answer_end)
        encoded = []
        for choice in choices:
            text = self._choice(choice, control_tokens, room)
            ids = encoder.encode((*piece, text, template.answer_end), control_tokens)
            tokens = ids[len(prompt) : len(ids) - len(end)]
            if not tokens or [*prompt, *tokens, *end] != ids:
                raise UsageError(
                    f"The tokenizer joins the choice {short_repr(choice)} with the text around it; word it differently."
                )
            if len(tokens) > room:
                raise self._too_long_choice(choice, str(len(tokens)), room)
            encoded.append(tuple(tokens))
        return encoded

    def _choice(self, choice: str, control_tokens: bool, room: int) -> str:
        text = self._valid_text(choice, "A choice", None, ()).strip()
        if (least := len(text) // self._encoder.longest_token) > room:
            raise self._too_long_choice(choice, f"at least {least}", room)
        if control_tokens:
            text = _without(text, *MARKER_IDS).strip()
        if is_empty(text, self._ignored):
            raise UsageError(f"The choice {short_repr(choice)} is empty; write an answer to the question.")
        return text

    def _too_long_choice(self, choice: str, length: str, room: int) -> FusionError:
        return FusionError(
            f"The choice {short_repr(choice)} has {length} tokens, and the context has room for {room} behind the "
            "prompt; shorten it, drop history, or export with a larger --max-context."
        )

    def _question(
        self, question: str, control_tokens: bool, budget: ContextBudget | None, before: Sequence[int]
    ) -> str:
        text = self._valid_text(question, "The question", budget, before).strip()
        if control_tokens:
            text = _without(text, *MARKER_IDS).strip()
        if is_empty(text, self._ignored):
            raise UsageError("The question is empty; ask something about the image.")
        return text

    def _answer(self, answer: str, control_tokens: bool, budget: ContextBudget | None, before: Sequence[int]) -> str:
        text = self._valid_text(answer, "An answer in the history", budget, before)
        if (blanks := len(text) - len(text.strip())) > MAX_WHITESPACE:
            raise UsageError(
                f"An answer in the history has {blanks} leading and trailing whitespace characters; strip it."
            )
        return _without(text, *MARKER_IDS) if control_tokens else text

    def _valid_text(self, text: str, name: str, budget: ContextBudget | None, before: Sequence[int]) -> str:
        if not isinstance(text, str):
            raise UsageError(f"{name} is of type {type(text).__name__}; expected a string.")
        if budget is not None:  # whitespace next to a control token may add no tokens
            budget.check_text(text.strip(), self._encoder, budget.left(before))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{name} is not valid Unicode: character {error.start} is half of a surrogate pair; remove it."
            ) from error
        return text


def encode_prompt(
    tokenizer: Tokenizer, template: Template, history: Sequence[Turn], question: str, *, control_tokens: bool = False
) -> Prompt:
    """Tokenize one conversation, as :meth:`PromptEncoder.encode`."""
    return PromptEncoder(tokenizer, template).encode(history, question, control_tokens=control_tokens)


def check_history(history: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return a copy of the turns. Raise ``UsageError`` unless they are a sequence of :class:`Turn`."""
    if not isinstance(history, Sequence) or not all(isinstance(turn, Turn) for turn in history):
        raise UsageError(f"The history is {short_repr(history)}; expected a list of Turn(question, answer).")
    return tuple(history)


def _without(text: str, *markers: str) -> str:
    """Remove all markers from a text, also those that a removal forms. Markers end with ``>``."""
    kept = ""
    for part in re.findall(r"[^>]*>|[^>]+", text):
        kept += part
        for marker in markers:
            kept = kept.removesuffix(marker)
    return kept
