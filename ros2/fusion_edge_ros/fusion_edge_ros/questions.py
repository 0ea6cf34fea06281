"""Questions and answers, also as JSON documents. Needs no ROS."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from fusion_edge import (
    Answer,
    Cancelled,
    Choice,
    DeadlineExceeded,
    FusionError,
    QueueFull,
    Stopped,
    Superseded,
    UsageError,
)
from fusion_edge_ros.frames import Frame

_REASONS: dict[type[FusionError], str] = {
    DeadlineExceeded: "deadline",
    Cancelled: "cancelled",
    Superseded: "superseded",
    QueueFull: "refused",
}
_CUT_SHORT = {
    "deadline": "The deadline passed before the answer was complete; allow more time.",
    "cancelled": "The question was cancelled before the answer was complete.",
}


@dataclass(frozen=True)
class Question:
    """A question, checked as far as no model is needed."""

    question: str
    id: str = ""
    """Given again with the answer."""
    topic: str = ""
    """Topic of the frame; empty for the node's only one."""
    choices: tuple[str, ...] = ()
    """Answers to choose from; empty for any answer."""
    schema: dict[str, Any] | None = None
    """JSON schema of the answer; None for a text."""
    deadline: float = 0.0
    """Seconds until the question ends; 0 for none."""
    max_new_tokens: int = 0
    """Limit of generated tokens; 0 for the node's limit."""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise UsageError("The question is empty; expected a text.")
        if self.choices and self.schema is not None:
            raise UsageError("choices and schema exclude each other; pass one of them.")
        if not (math.isfinite(self.deadline) and self.deadline >= 0):
            raise UsageError(f"deadline is {self.deadline}; expected a number of seconds from 0 (none).")
        if self.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; expected an integer from 0 (the node's limit).")


@dataclass(frozen=True)
class Reply:
    """How a question ended."""

    text: str
    """The answer, also one that was cut short."""
    finish_reason: str
    """``stop``, ``length``, ``deadline``, ``cancelled``, ``superseded``, ``refused`` by a full queue, or ``failed``."""
    error: str = ""
    """Why there is no complete answer; empty for one."""
    document: Any = None
    """The JSON document of a question with a schema."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Probability of each choice, in the order of the choices."""


def reply_of_result(result: Any, question: Question) -> Reply:
    """Return the reply of what a request's ``result()`` returned."""
    if isinstance(result, Choice):
        return Reply(result.text, "stop", probabilities=result.probabilities)
    if question.schema is not None:
        return Reply(json_text(result), "stop", document=result)
    assert isinstance(result, Answer)
    return Reply(result.text, result.finish_reason, _CUT_SHORT.get(result.finish_reason, ""))


def reply_of_error(error: Exception) -> Reply:
    """Return the reply of what a request raised."""
    text = error.partial.text if isinstance(error, Stopped) else ""
    reason = next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), "failed")
    return Reply(text, reason, str(error) if isinstance(error, FusionError) else repr(error))


def question_of_json(text: str) -> Question:
    """Return the question of a JSON document, whose members are the fields of :class:`Question`.

    Raises:
        UsageError: The document is not JSON, or a member is unknown or wrong.
    """
    document = object_of_json("The question", text)
    known = {member.name for member in fields(Question)}
    if unknown := sorted(document.keys() - known):
        raise UsageError(f"The question has the unknown member {unknown[0]!r}; expected {', '.join(sorted(known))}.")
    if "question" not in document:
        raise UsageError("The question has no member 'question'; expected its text there.")
    for name, value in document.items():
        if not _fits(name, value):
            raise UsageError(f"The question's member {name!r} is {json_text(value)[:80]}; expected {_EXPECTED[name]}.")
    return Question(**{**document, "choices": tuple(document.get("choices", ()))})


_EXPECTED = {
    **dict.fromkeys(("question", "id", "topic"), "a string"),
    "choices": "an array of strings",
    "schema": "a JSON schema, an object",
    "deadline": "a number of seconds",
    "max_new_tokens": "an integer",
}


def _fits(name: str, value: object) -> bool:
    if name == "choices":
        return isinstance(value, list) and all(isinstance(choice, str) for choice in value)
    types = {"schema": (dict,), "deadline": (int, float), "max_new_tokens": (int,)}
    return isinstance(value, types.get(name, (str,))) and not isinstance(value, bool)


def answer_json(question: Question, reply: Reply, frame: Frame | None) -> str:
    """Return the JSON document of an answer that ends now.

    Args:
        question: The question.
        reply: How it ended.
        frame: The frame that it was about; None if there was none.
    """
    stamp = None if frame is None else {"sec": frame.header.stamp.sec, "nanosec": frame.header.stamp.nanosec}
    return json_text(
        {
            "id": question.id,
            "question": question.question,
            "topic": question.topic,
            "stamp": stamp,
            "frame_id": None if frame is None else frame.header.frame_id,
            "text": reply.text,
            "json": reply.document,
            "probabilities": reply.probabilities or None,
            "finish_reason": reply.finish_reason,
            "error": reply.error or None,
            "age": None if frame is None else round(frame.age, 6),
        }
    )


def object_of_json(name: str, text: str) -> dict[str, Any]:
    """Parse a JSON object. ``name`` begins the message of the :class:`UsageError` for anything else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON ({error}); expected an object.") from None
    if not isinstance(document, dict):
        raise UsageError(f"{name} is {text[:80]!r}; expected a JSON object.")
    return document


def json_text(document: Any) -> str:
    """Return a JSON document as text, of one line."""
    return json.dumps(document, ensure_ascii=False)
