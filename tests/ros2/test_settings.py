"""Parameters, and the files that name them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fusion_edge_ros.questions import Question
from fusion_edge_ros.settings import PARAMETERS, settings_of

from fusion_edge import FusionError

ROOT = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = {parameter.name: parameter.default for parameter in PARAMETERS}


def test_defaults() -> None:
    settings = settings_of(DEFAULTS)
    assert (settings.topics, settings.threads, settings.query_length) == (("image",), None, None)
    assert settings.standing is None
    assert settings.action
    assert not settings.autostart


def test_a_standing_question() -> None:
    values = {**DEFAULTS, "question": "Clear?", "choices": ["yes", "no"], "deadline": 0.5}
    assert settings_of(values).standing == Question("Clear?", choices=("yes", "no"), deadline=0.5)
    values = {**DEFAULTS, "question": "Clear?", "schema": '{"type": "boolean"}'}
    assert settings_of(values).standing == Question("Clear?", schema={"type": "boolean"})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"topics": []}, "topics is []; expected the names of one or more topics, each once."),
        ({"topics": ["image", ""]}, "topics is ['image', '']; expected"),
        ({"topics": ["image", "image"]}, "topics is ['image', 'image']; expected"),
        ({"schema": "{}"}, "choices and schema are for the parameter question, which is empty; set it, too."),
        ({"question": "What?", "schema": "[]"}, "schema is '[]'; expected a JSON object."),
        ({"question": "What?", "schema": "{}", "choices": ["a", "b"]}, "choices and schema exclude each other"),
        ({"question": " "}, "The question is empty"),
    ],
)
def test_refused_settings(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(FusionError, match=re.escape(error)):
        settings_of({**DEFAULTS, **changes})


def test_the_table_of_the_docs() -> None:
    text = (ROOT / "docs/ros2.md").read_text(encoding="utf-8")
    text = text[text.index("## Parameters") : text.index("## Interfaces")]
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| `(.*?)` \|", text, re.MULTILINE))
    assert {name: json.loads(default) for name, default in rows.items()} == DEFAULTS
