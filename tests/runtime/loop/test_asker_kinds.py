"""Documents, choices and scenes through an asker."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.watched_backend import SHORT, BlockedCall, picture, watched_fusion
from support.askers import MakeAsker, text

from fusion_edge.runtime import (
    Asker,
    Cancelled,
    Fusion,
    UsageError,
)

SCHEMA = {"type": "object", "properties": {"clear": {"type": "boolean"}}, "required": ["clear"]}


def test_documents(fusion: Fusion, make: MakeAsker) -> None:
    pytest.importorskip("llguidance")
    asker = make(skip_unchanged=True)
    document = fusion.json(picture(), "Is the path clear?", SCHEMA)
    request = asker.submit_json(picture(), "Is the path clear?", SCHEMA, key="front")
    assert request.result(20) == document
    assert isinstance(document["clear"], bool)
    assert list(request) == []
    again = asker.submit_json(picture(), "Is the path clear?", SCHEMA, key="front")
    text = asker.submit(picture(), "Is the path clear?", key="front text", sampling=SHORT)
    assert again.result(20) == document
    assert again.is_unchanged
    assert text.result(20).text != str(document)


def test_a_cut_document_is_an_error(fusion: Fusion, asker: Asker) -> None:
    pytest.importorskip("llguidance")
    call = BlockedCall(fusion, "decode")
    request = asker.submit_json(picture(), "What?", {"type": "string", "minLength": 300})
    assert call.reached.wait(20)
    request.cancel()
    call.release()
    with pytest.raises(Cancelled, match="within the JSON document"):
        request.result(20)
    assert asker.latencies().cancelled == 1


def test_an_unusable_schema_is_refused_at_once(asker: Asker) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(UsageError):
        asker.submit_json(picture(), "What?", {"type": "no type"})


def test_choices(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(skip_unchanged=True)
    expected = fusion.choose(picture(), "Is the path clear?", ("yes", "no"))
    request = asker.submit_choose(picture(), "Is the path clear?", ["yes", "no"], key="front")
    choice = request.result(20)
    assert (choice.text, choice.probabilities) == (expected.text, expected.probabilities)
    assert list(request) == []
    again = asker.submit_choose(picture(), "Is the path clear?", ("yes", "no"), key="front")
    assert again.result(20) is choice
    assert again.is_unchanged
    other = asker.submit_choose(picture(), "Is the path clear?", ("no", "yes"), key="front")
    assert other.result(20).text == expected.text
    assert not other.is_unchanged
    for wrong in (("yes",), ("yes", "yes"), 3):
        with pytest.raises(UsageError):
            asker.submit_choose(picture(), "Is the path clear?", wrong).result(20)  # type: ignore[arg-type]


def test_a_choice_is_canceled(fusion: Fusion, asker: Asker) -> None:
    call = BlockedCall(fusion, "prefill")
    request = asker.submit_choose(picture(), "What?", ("yes", "no"))
    assert call.reached.wait(20)
    request.cancel()
    call.release()
    with pytest.raises(Cancelled, match="prefill"):
        request.result(20)


def test_scenes(fusion: Fusion, make: MakeAsker) -> None:
    asker = make(skip_unchanged=True)
    with fusion.look(picture(), guide="What?") as scene:
        request = asker.submit(scene, "What?", key="front", sampling=SHORT)
        assert "".join(request).strip() == request.result(20).text == text(fusion)
        choice = asker.submit_choose(scene, "What?", ("yes", "no")).result(20)
        assert choice.probabilities == pytest.approx(fusion.choose(picture(), "What?", ("yes", "no")).probabilities)
    with pytest.raises(UsageError, match="closed"):
        asker.submit(scene, "What?").result(20)


def test_a_scene_of_another_model_is_refused(asker: Asker, tiny_bundle: Path) -> None:
    with watched_fusion(tiny_bundle) as other, pytest.raises(UsageError, match="The scene is of another model"):
        asker.submit(other.look(picture()), "What?")
