"""Questions and answers as JSON documents."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from fusion_edge_ros.frames import Frame
from fusion_edge_ros.questions import (
    Question,
    Reply,
    answer_json,
    question_of_json,
    reply_of_error,
    reply_of_result,
)
from hypothesis import given
from hypothesis import strategies as st
from ros2.messages import Header

from fusion_edge import Answer, Cancelled, Choice, DeadlineExceeded, FusionError, QueueFull, Superseded

CUT = Answer("so far", (1,), 1, "cancelled", {}, 0.0)
texts = st.text(min_size=1).filter(str.strip)


@given(
    question=st.builds(
        Question,
        texts,
        id=st.text(),
        topic=st.text(),
        choices=st.lists(st.text(), max_size=3).map(tuple),
        deadline=st.floats(0, 1e6),
        max_new_tokens=st.integers(0, 1000),
    )
)
def test_questions(question: Question) -> None:
    document = {name: value for name, value in asdict(question).items() if name != "schema"}
    assert question_of_json(json.dumps(document)) == question


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ("What?", "The question is not JSON (Expecting value: line 1 column 1 (char 0)); expected an object."),
        ("[" * 100000, "The question is not JSON"),
        ('["What?"]', "The question is '[\"What?\"]'; expected a JSON object."),
        ("{}", "The question has no member 'question'; expected its text there."),
        (
            {"question": "What?", "prompt": ""},
            "The question has the unknown member 'prompt'; expected choices, deadline",
        ),
        ({"question": 3}, "The question's member 'question' is 3; expected a string."),
        ({"question": " "}, "The question is empty; expected a text."),
        ({"question": "What?", "choices": ["a", 1]}, "'choices' is [\"a\", 1]; expected an array of strings."),
        ({"question": "What?", "schema": []}, "'schema' is []; expected a JSON schema, an object."),
        ({"question": "What?", "deadline": True}, "'deadline' is true; expected a number of seconds."),
        ({"question": "What?", "deadline": -1}, "deadline is -1; expected a number of seconds from 0 (none)."),
        ({"question": "What?", "deadline": float("nan")}, "deadline is nan; expected"),
        ({"question": "What?", "max_new_tokens": 1.5}, "'max_new_tokens' is 1.5; expected an integer."),
        ({"question": "What?", "max_new_tokens": -1}, "max_new_tokens is -1; expected an integer from 0"),
        ({"question": "What?", "choices": ["a", "b"], "schema": {}}, "choices and schema exclude each other"),
    ],
)
def test_refused_questions(document: object, error: str) -> None:
    text = document if isinstance(document, str) else json.dumps(document)
    with pytest.raises(FusionError, match=re.escape(error)):
        question_of_json(text)


@pytest.mark.parametrize(
    ("result", "schema", "reply"),
    [
        (Answer("blue", (1,), 1, "stop", {}, 0.0), None, Reply("blue", "stop")),
        (Answer("blue and", (1,), 1, "length", {}, 0.0), None, Reply("blue and", "length")),
        (
            Choice("a", {"a": 0.75, "b": 0.25}, 0.5, {}, 1, {}),
            None,
            Reply("a", "stop", probabilities={"a": 0.75, "b": 0.25}),
        ),
        ({"ü": [1]}, {}, Reply('{"ü": [1]}', "stop", document={"ü": [1]})),
    ],
)
def test_replies(result: Any, schema: dict[str, Any] | None, reply: Reply) -> None:
    assert reply_of_result(result, Question("What?", schema=schema)) == reply


@pytest.mark.parametrize("reason", ["deadline", "cancelled"])
def test_a_reply_cut_short(reason: Any) -> None:
    reply = reply_of_result(Answer("so far", (1,), 1, reason, {}, 0.0), Question("What?"))
    assert (reply.text, reply.finish_reason) == ("so far", reason)
    assert reply.error.endswith(("allow more time.", "before the answer was complete."))


@pytest.mark.parametrize(
    ("error", "text", "reason", "message"),
    [
        (Cancelled("It stopped.", "prefill", CUT), "so far", "cancelled", "It stopped."),
        (DeadlineExceeded("Too late.", "prefill", CUT), "so far", "deadline", "Too late."),
        (Superseded("Newer.", "waiting", CUT), "so far", "superseded", "Newer."),
        (QueueFull("Full.", "waiting", CUT), "so far", "refused", "Full."),
        (FusionError("No."), "", "failed", "No."),
        (KeyError("defect"), "", "failed", "KeyError('defect')"),
    ],
)
def test_errors(error: Exception, text: str, reason: str, message: str) -> None:
    assert reply_of_error(error) == Reply(text, reason, message)


def test_answers() -> None:
    question = Question("Wärmer?", id="7", topic="image")
    frame = Frame(np.zeros((1, 1, 3), np.uint8), "rgb", Header(), received=time.monotonic() - 100)
    text = answer_json(question, Reply("ja", "stop", probabilities={"ja": 1.0}), frame)
    assert "Wärmer" in text
    document = json.loads(text)
    assert 100 <= document.pop("age") < 200  # since the frame came, not since the question
    assert document == {
        "id": "7",
        "question": "Wärmer?",
        "topic": "image",
        "stamp": {"sec": 3, "nanosec": 500},
        "frame_id": "front",
        "text": "ja",
        "json": None,
        "probabilities": {"ja": 1.0},
        "finish_reason": "stop",
        "error": None,
    }
    document = json.loads(answer_json(question, Reply("", "failed", "No frame."), None))
    assert (document["stamp"], document["frame_id"], document["age"]) == (None, None, None)
    assert document["error"] == "No frame."
