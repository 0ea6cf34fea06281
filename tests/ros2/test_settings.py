"""Parameters, and the files that name them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
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
        (
            {"topics": ["front", "rear", "left"], "capacity": 2},
            "capacity is 2; expected at least 3, one for each of the",
        ),
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


def test_as_many_questions_as_topics_may_wait() -> None:
    assert settings_of({**DEFAULTS, "topics": ["front", "rear"], "capacity": 2}).capacity == 2


def test_the_program_runs_in_the_virtual_environment_that_is_active(tmp_path: Path) -> None:
    """``ros2 run`` and ``ros2 launch`` start the file itself: its first line chooses the Python."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "ros2/fusion_edge_ros", source)
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "install",
        "--prefix",
        str(tmp_path / "install"),
    ]  # as colcon does
    command += ["--single-version-externally-managed", "--record", str(tmp_path / "record")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    program = (tmp_path / "install/lib/fusion_edge_ros/fusion_edge_node").read_text(encoding="utf-8")
    assert program.splitlines()[0] == "#!/usr/bin/env python3"
