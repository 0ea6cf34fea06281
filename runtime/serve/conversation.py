"""The messages of a request as FUSION's prompt takes them: a picture, earlier turns, a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusion_edge.runtime.prompts.prompt import Turn
from fusion_edge.runtime.serve.chat_request import (
    AssistantMessage,
    ImagePart,
    ImageUrl,
    Message,
    TextPart,
    UserMessage,
)
from fusion_edge.runtime.serve.errors import ApiError


@dataclass(frozen=True)
class Dialogue:
    """A conversation about one picture."""

    image: ImageUrl
    image_path: str
    """Field of the picture's URL, for errors."""
    history: tuple[Turn, ...]
    question: str


def read_dialogue(messages: Sequence[Message], system_text: str) -> Dialogue:
    """Return the conversation of the messages.

    ``system_text`` is the model's own. Raises :class:`ApiError` with the path of the message that does not fit.
    """
    is_turn = [isinstance(message, UserMessage | AssistantMessage) for message in messages]
    if True not in is_turn:
        raise ApiError(400, "messages have no question; add a user message.", "messages")
    first = is_turn.index(True)
    for number, message in enumerate(messages[:first]):
        _check_system(_text(message), f"messages[{number}].content", system_text)
    turns = list(enumerate(messages))[first:]
    for place, (number, message) in enumerate(turns):
        expected = UserMessage if place % 2 == 0 else AssistantMessage
        if not isinstance(message, expected):
            role = "user" if expected is UserMessage else "assistant"
            raise ApiError(
                400,
                f"messages[{number}].role is {message.role}; expected {role}: after system messages, user and "
                "assistant take turns.",
                f"messages[{number}].role",
            )
    if len(turns) % 2 == 0:
        raise ApiError(
            400, f"messages end with a {turns[-1][1].role} message; end with a question of the user.", "messages"
        )
    questions = [_text(message) for _, message in turns[::2]]
    answers = [_text(message) for _, message in turns[1::2]]
    image, path = _picture(turns)
    history = tuple(Turn(question, answer) for question, answer in zip(questions, answers, strict=False))
    return Dialogue(image, path, history, questions[-1])


def _picture(turns: Sequence[tuple[int, Message]]) -> tuple[ImageUrl, str]:
    """Return the only picture of a conversation, which the first question has, and the path of its URL."""
    found = [
        (part.image_url, place, f"messages[{number}].content[{index}].image_url")
        for place, (number, message) in enumerate(turns)
        if not isinstance(message.content, str)
        for index, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
    if not found:
        number = turns[0][0]
        raise ApiError(
            400,
            f"messages[{number}].content has no image_url; FUSION answers questions about a picture: add one.",
            f"messages[{number}].content",
            "missing_image",
        )
    for _, place, path in found[(found[0][1] == 0) :]:
        remedy = "start another conversation" if place else "ask about each picture in a request of its own"
        raise ApiError(400, f"{path}: a conversation has one picture, in its first question; {remedy}.", path)
    image, _, path = found[0]
    return image, f"{path}.url"


def _check_system(text: str, path: str, own: str) -> None:
    if text.strip() not in ("", own):
        raise ApiError(
            400,
            f"{path}: FUSION was trained with one system text, {own!r}; leave the message out, and write what the "
            "model should know into the question.",
            path,
            "unsupported_system_text",
        )


def _text(message: Message) -> str:
    """Return the text of a message. Its parts become lines."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))
