"""``fusion-run --choices``: text, JSON, questions from standard input, and wrong lists."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fusion_edge.runtime import load
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.cli.choices import choice_list

Refuse = Callable[..., str]
QUESTIONS = ("Is it clear?", "Is it dark?")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def command(tiny_bundle: Path, image: Path) -> list[str]:
    return [str(tiny_bundle), "--image", str(image), "--threads=1", "--choices", 'yes, "no, it is not"']


ASKED = [option for question in QUESTIONS for option in ("--ask", question)]


def chosen(bundle: Path, image: Path) -> list[Any]:
    """Return what the Python API chooses."""
    with load(bundle, threads=1) as fusion:
        conversation = fusion.conversation(image)
        return [conversation.choose(question, ("yes", "no, it is not")) for question in QUESTIONS]


def test_json(command: list[str], tiny_bundle: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_run.main([*command, *ASKED, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    expected = chosen(tiny_bundle, image)
    assert [answer["text"] for answer in answers] == [choice.text for choice in expected]
    assert answers[0].keys() == {"text", "probabilities", "margin", "logprobs", "prompt_tokens", "timings_ms"}
    for answer, choice in zip(answers, expected, strict=True):
        assert answer["probabilities"] == pytest.approx(choice.probabilities, abs=1e-9)
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["prompt_tokens"] == choice.prompt_tokens
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]  # the second question continues the conversation


def test_text(command: list[str], tiny_bundle: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_run.main([*command, *ASKED]) == 0
    lines = [f"{choice.text} ({choice.probabilities[choice.text]:.1%})" for choice in chosen(tiny_bundle, image)]
    assert capsys.readouterr().out.splitlines() == lines


def test_questions_from_standard_input(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli_run.main([*command, *ASKED]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{question}\n" for question in QUESTIONS)))
    assert cli_run.main(command) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes,no", ("yes", "no")),
        ("yes, no", ("yes", "no")),
        ('"yes, it is",no', ("yes, it is", "no")),
        ('"say ""yes""",no', ('say "yes"', "no")),
    ],
)
def test_lists(text: str, expected: tuple[str, ...]) -> None:
    assert choice_list(text) == expected


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ('"yes,no', "is not a list of choices such as yes,no"),
        ("yes\nno", "is not a list of choices such as yes,no"),
        ("", "The choices are []; expected at least two"),
        ("yes", "expected at least two"),
        (",".join(map(str, range(300))), "There are 300 choices; expected at most 256"),
    ],
)
def test_lists_that_cannot_be_read(
    command: list[str], choices: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli_run.main([*command[:-1], choices, *ASKED])
    assert message in capsys.readouterr().err


def test_choices_that_cannot_be_compared(command: list[str], refused: Refuse) -> None:
    for choices, message in {"yes,yes": "are equal", "yes,": "is empty", "yes,yesterday": "is the start of"}.items():
        assert message in refused(cli_run.main, *command[:-1], choices, *ASKED, code=2)


@pytest.mark.parametrize("option", ["--temperature=1", "--max-new-tokens=5", "--stop=x", "--regex=yes"])
def test_options_without_effect(command: list[str], option: str, refused: Refuse) -> None:
    message = refused(cli_run.main, *command, *ASKED, option, code=2)
    assert "--choices generates no answer; drop --schema, --regex, --max-new-tokens, --stop" in message
