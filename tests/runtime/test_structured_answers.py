"""Answers of a shape on a bundle with random weights: documents, patterns, choices, and every way to be cut."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from fusion_edge import Cancelled, DeadlineExceeded, Fusion, FusionError, Grammar, Sampling, UsageError, load
from fusion_edge.benchmarks.random_schemas import random_schema
from fusion_edge.runtime.cli.run import main
from fusion_edge.runtime.stages import DECODE_STEP

FRAME = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
SCHEMA = {
    "type": "object",
    "properties": {"clear": {"type": "boolean"}, "meters": {"type": "number", "minimum": 0, "maximum": 9}},
    "required": ["clear", "meters"],
}
ENDLESS = {"type": "string", "minLength": 300}
"""No document of it is complete within a few tokens."""


@pytest.fixture(scope="module")
def fusion(tiny_bundle: Path) -> Iterator[Fusion]:
    with load(tiny_bundle, device="cpu") as loaded:
        yield loaded


def seeded(seed: int) -> Sampling:
    return Sampling(max_new_tokens=400, temperature=1.0, seed=seed)


@pytest.mark.parametrize("seed", range(100, 115))
def test_documents_are_valid(fusion: Fusion, seed: int) -> None:
    schema = random_schema(seed)
    value = fusion.json(FRAME, "What is ahead?", schema, sampling=seeded(seed))
    Draft202012Validator(schema).validate(value)


def test_documents_of_the_likeliest_tokens(fusion: Fusion) -> None:
    value = fusion.json(FRAME, "Is the path clear?", SCHEMA)
    assert list(value) == ["clear", "meters"]
    assert isinstance(value["clear"], bool)
    assert 0 <= value["meters"] <= 9
    assert fusion.json(FRAME, "Is the path clear?", SCHEMA) == value


def test_patterns_and_choices_in_every_asking_call(fusion: Fusion) -> None:
    choices = ("left", "right", "neither")
    answers = {fusion.answer(FRAME, "Where?", sampling=seeded(n), choices=choices).text for n in range(12)}
    assert len(answers) > 1
    assert answers <= set(choices)
    assert "".join(fusion.ask(FRAME, "Where?", regex="[0-9]{3}")).isdecimal()
    stream = fusion.stream(FRAME, "Where?", sampling=Sampling(grammar=Grammar.choices(choices)))
    assert "".join(stream) in choices
    assert stream.answer.finish_reason == "stop"
    conversation = fusion.conversation(FRAME)
    assert conversation.answer("Where?", choices=choices).text in choices
    assert conversation.json("Is the path clear?", SCHEMA).keys() == {"clear", "meters"}
    assert json.loads(conversation.history[1].answer).keys() == {"clear", "meters"}


def test_another_question_in_between_does_not_disturb(fusion: Fusion) -> None:
    plain = fusion.answer(FRAME, "What is it?", sampling=Sampling(max_new_tokens=8)).token_ids
    fusion.json(FRAME, "Is the path clear?", SCHEMA)
    assert fusion.answer(FRAME, "What is it?", sampling=Sampling(max_new_tokens=8)).token_ids == plain


def test_the_token_limit_is_an_error(fusion: Fusion) -> None:
    conversation, short = fusion.conversation(FRAME), Sampling(max_new_tokens=5)
    message = r"^The answer was cut after 5 tokens, within the JSON document; raise max_new_tokens"
    with pytest.raises(FusionError, match=message):
        fusion.json(FRAME, "What?", ENDLESS, sampling=short)
    with pytest.raises(FusionError, match=message):
        conversation.json("What?", ENDLESS, sampling=short)
    assert conversation.history == []  # no half of a document


def test_a_full_context_is_an_error(fusion: Fusion) -> None:
    with pytest.raises(FusionError, match="or the bundle's context"):
        fusion.json(FRAME, "What?", {"type": "string", "minLength": 3000}, sampling=Sampling(max_new_tokens=10**6))


def test_a_cancel_within_a_document(fusion: Fusion) -> None:
    def cancel(stage: str) -> None:
        if stage == DECODE_STEP:
            fusion.cancel()

    with pytest.raises(Cancelled) as caught:
        fusion.json(FRAME, "What?", ENDLESS, on_stage=cancel)
    assert caught.value.stage == DECODE_STEP
    assert caught.value.partial.finish_reason == "cancelled"
    assert fusion.json(FRAME, "Is the path clear?", SCHEMA).keys() == {"clear", "meters"}


def test_a_deadline_within_a_document(fusion: Fusion) -> None:
    started = time.monotonic()

    def wait(stage: str) -> None:
        while stage == DECODE_STEP and time.monotonic() < started + 3.1:
            pass

    with pytest.raises(DeadlineExceeded, match=r"^The deadline passed after \d+ tokens, within the JSON doc") as caught:
        fusion.json(FRAME, "What?", ENDLESS, deadline=3, on_stage=wait)
    assert caught.value.stage == DECODE_STEP
    assert caught.value.partial.text.startswith('"')
    assert caught.value.partial.finish_reason == "deadline"
    with pytest.raises(DeadlineExceeded):
        fusion.json(FRAME, "What?", SCHEMA, deadline=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "choices": ["a"]}, "regex and choices exclude each other; pass one of them"),
        ({"regex": "a", "sampling": Sampling(grammar=Grammar.regex("b"))}, "regex and sampling.grammar exclude"),
        ({"regex": "("}, "The regular expression '\\(' cannot be used: unclosed group"),
        ({"regex": 5}, "The regular expression is 5"),
        ({"choices": []}, r"The choices are \[\]"),
        ({"choices": "yes"}, "The choices are 'yes'"),
        ({"regex": "a", "sampling": Sampling(stop=("b",))}, "stop and grammar exclude each other"),
        ({"sampling": "greedy", "regex": "a"}, "sampling is of type str"),
    ],
)
def test_wrong_options_are_refused(fusion: Fusion, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        fusion.answer(FRAME, "What?", **options)


@pytest.mark.parametrize(
    "schema", [None, {"type": "object", "minimun": 3}, {"type": "integer", "minimum": 2, "maximum": 1}]
)
def test_unusable_schemas_are_refused_before_anything_runs(fusion: Fusion, schema: Any) -> None:
    stages: list[str] = []
    with pytest.raises(UsageError, match=r"^The JSON schema "):
        fusion.json(FRAME, "What?", schema, on_stage=stages.append)
    assert stages == []


def test_a_schema_with_another_grammar_is_refused(fusion: Fusion) -> None:
    with pytest.raises(UsageError, match=r"^schema and sampling\.grammar exclude each other"):
        fusion.json(FRAME, "What?", SCHEMA, sampling=Sampling(grammar=Grammar.regex("b")))
    with pytest.raises(UsageError, match=r"^schema and regex exclude each other"):
        fusion.json(FRAME, "What?", SCHEMA, regex="b")


class TestCommand:
    @pytest.fixture
    def picture(self, tmp_path: Path) -> str:
        path = tmp_path / "frame.ppm"
        path.write_bytes(b"P6 60 40 255 " + FRAME.tobytes())
        return str(path)

    @pytest.fixture
    def schema(self, tmp_path: Path) -> Path:
        path = tmp_path / "schema.json"
        path.write_text(json.dumps(SCHEMA), encoding="utf-8")
        return path

    def test_schema(self, tiny_bundle: Path, picture: str, schema: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = [str(tiny_bundle), "--image", picture, "--ask", "Clear?", "--schema", str(schema)]
        assert main(command) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed.keys() == {"clear", "meters"}
        assert main([*command, "--json"]) == 0
        [answer] = json.loads(capsys.readouterr().out)["answers"]
        assert json.loads(answer["text"]) == printed

    def test_regex(self, tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(tiny_bundle), "--image", picture, "--ask", "How many?", "--regex", "[0-9]{2}"]) == 0
        assert capsys.readouterr().out.strip().isdecimal()

    def test_a_cut_document_is_not_printed(
        self, tiny_bundle: Path, picture: str, schema: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = [str(tiny_bundle), "--image", picture, "--ask", "Clear?", "--schema", str(schema)]
        for option in ([], ["--json"]):
            assert main([*command, "--max-new-tokens", "2", *option]) == 1
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.startswith("error: The answer was cut after 2 tokens, within the JSON document;")

    @pytest.mark.parametrize(
        ("content", "code", "message"),
        [
            ("{", 1, "Cannot read the JSON schema in .* expected a JSON object"),
            ('{"type": "null", "type": "null"}', 1, "Cannot read the JSON schema in .*'type' is a duplicate key"),
            ("[]", 2, r"The JSON schema is \[\]; expected a dict"),
            ('{"type": "text"}', 2, "The JSON schema is not supported at \\$: it has the type 'text'"),
        ],
    )
    def test_files_that_are_no_schema(
        self,
        refused: Callable[..., str],
        tiny_bundle: Path,
        picture: str,
        schema: Path,
        content: str,
        code: int,
        message: str,
    ) -> None:
        schema.write_text(content, encoding="utf-8")
        error = refused(main, tiny_bundle, "--image", picture, "--ask", "Clear?", "--schema", schema, code=code)
        assert re.match(f"error: {message}", error)
