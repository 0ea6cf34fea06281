"""Prompts of the released code, the reference for the runtime. Every earlier prompt is tokenized from its start.

Spellings of control tokens in questions and answers are control tokens there, and image markers are removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from fusion_edge.runtime.bundle.templates import Template
from fusion_edge.runtime.prompts.prompt import MARKER_IDS, VISION_END, VISION_START, Prompt, Turn


def render_prompt(template: Template, history: Sequence[Turn], question: str) -> str:
    """Return the text of a conversation, with markers, up to the start of the answer to ``question``."""
    text = template.system
    for number, turn in enumerate([*history, Turn(question, "")]):
        text += f"{template.question_start}{VISION_START}<latent_image>{VISION_END}"
        if number == 0:
            text += f"{VISION_START}<image>{VISION_END}\n"
        text += f"{_clean(turn.question)}{template.question_end}{template.answer_start}"
        if number < len(history):
            text += _without(turn.answer, *MARKER_IDS) + template.answer_end
    return text


def encode_prompt(tokenizer: Tokenizer, template: Template, history: Sequence[Turn], question: str) -> Prompt:
    """Tokenize a conversation."""
    questions = [*(turn.question for turn in history), question]
    asked = [_encode(tokenizer, render_prompt(template, history[:n], text)) for n, text in enumerate(questions)]
    instruct = _without("".join(map(_clean, questions)), *MARKER_IDS, VISION_START, VISION_END).strip()
    return Prompt(
        token_ids=np.array(asked[-1], np.int64),
        instruct_ids=np.array(_encode(tokenizer, instruct), np.int64),
        instruct_indices=np.array([len(ids) - 1 for ids in asked], np.int64),
    )


def _clean(question: str) -> str:
    return _without(question, *MARKER_IDS).strip()


def _without(text: str, *markers: str) -> str:
    pattern = re.compile("|".join(map(re.escape, markers)))
    while pattern.search(text):
        text = pattern.sub("", text)
    return text


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = list(tokenizer.encode("").ids)
    for piece in re.split(f"({'|'.join(map(re.escape, MARKER_IDS))})", text):
        marker = MARKER_IDS.get(piece)
        ids += tokenizer.encode(piece, add_special_tokens=False).ids if marker is None else [marker]
    return ids
