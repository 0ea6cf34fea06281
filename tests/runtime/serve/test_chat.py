"""OpenAI's own client asks a server: every field, whole answers and streams."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest
from fakes.watched_backend import picture
from openai import OpenAI
from support.http_servers import MODEL, HttpServer, user

from fusion_edge.runtime import Fusion, Sampling, Turn

LIMIT = 12
ASKED: dict[str, Any] = {"model": MODEL, "messages": [user()], "max_tokens": LIMIT}


def create(client: OpenAI, **fields: Any) -> Any:
    """Ask with fields that a test composes, which the client's overloads cannot check."""
    return client.chat.completions.create(**fields)


def test_an_answer_is_the_model_s(client: OpenAI, fusion: Fusion) -> None:
    expected = fusion.answer(picture(), "What?", sampling=Sampling(max_new_tokens=LIMIT))
    found = create(client, **ASKED)
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert (found.object, found.model) == ("chat.completion", MODEL)
    assert found.id == found._request_id
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.prompt_tokens > 16  # image tokens count
    assert found.usage.completion_tokens == len(expected.token_ids) == LIMIT
    assert found.usage.total_tokens == expected.prompt_tokens + LIMIT


def test_a_stream_is_the_same_answer(client: OpenAI, fusion: Fusion) -> None:
    expected = fusion.answer(picture(), "What?", sampling=Sampling(max_new_tokens=LIMIT))
    chunks = list(create(client, **ASKED, stream=True))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    first, *pieces, last = (chunk.choices[0] for chunk in chunks)
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert "".join(piece.delta.content or "" for piece in pieces) == expected.text
    assert len(pieces) > 1
    assert all(piece.delta.content and piece.finish_reason is None for piece in pieces)
    assert (last.delta.content, last.finish_reason) == (None, "length")


def test_the_usage_of_a_stream(client: OpenAI) -> None:
    whole = create(client, **ASKED)
    *chunks, last = create(client, **ASKED, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)


def test_a_stream_ends_with_done(server: HttpServer) -> None:
    reply = server.ask(ASKED | {"stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-request-id"].startswith("chatcmpl-")
    events = reply.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: OpenAI, fusion: Fusion, stream: bool) -> None:
    expected = fusion.answer(picture(), "What?", sampling=Sampling(max_new_tokens=LIMIT, logprobs=3))
    found = create(client, **ASKED, logprobs=True, top_logprobs=3, stream=stream)
    choice = list(found)[-1].choices[0] if stream else found.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-12)
    content = bytes(byte for token in choice.logprobs.content for byte in token.bytes or ())
    assert content.decode(errors="replace").strip() == expected.text
    for token, likeliest in zip(choice.logprobs.content, expected.top_logprobs, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(list(likeliest.values())[:3], abs=1e-12)
        assert token.token == bytes(token.bytes or ()).decode(errors="replace")


def test_log_probabilities_without_likeliest_tokens(client: OpenAI) -> None:
    logprobs = create(client, **ASKED, logprobs=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == LIMIT
    assert all(token.top_logprobs == [] for token in logprobs.content)


def test_sampling(client: OpenAI, fusion: Fusion) -> None:
    varied = Sampling(max_new_tokens=LIMIT, temperature=1.5, top_p=0.9, seed=7)
    expected = fusion.answer(picture(), "What?", sampling=varied).text
    fields: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    assert create(client, **ASKED, **fields).choices[0].message.content == expected
    other = create(client, **ASKED, **(fields | {"seed": -7}))
    assert other.choices[0].message.content != expected != fusion.answer(picture(), "What?").text


@pytest.mark.parametrize("form", [str, lambda text: ["never", text]])
def test_stop(client: OpenAI, fusion: Fusion, form: Any) -> None:
    whole = fusion.answer(picture(), "What?", sampling=Sampling(max_new_tokens=LIMIT)).text
    stop = whole[len(whole) // 2 :][:3]
    (choice,) = create(client, **ASKED, stop=form(stop)).choices
    assert choice.message.content == whole[: whole.index(stop)].strip()
    assert choice.finish_reason == "stop"


def test_both_names_of_the_limit(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": [user()]}
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        usage = create(client, **asked, **fields).usage
        assert usage.completion_tokens == 3


SCHEMA = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema(client: OpenAI, fusion: Fusion, stream: bool) -> None:
    expected = fusion.json(picture(), "What?", SCHEMA, sampling=Sampling(max_new_tokens=100))
    wanted = {"type": "json_schema", "json_schema": {"name": "color", "schema": SCHEMA, "strict": True}}
    found = create(client, **(ASKED | {"max_tokens": 100}), response_format=wanted, stream=stream)
    text = "".join(c.choices[0].delta.content or "" for c in found) if stream else found.choices[0].message.content
    assert json.loads(text) == expected


def test_a_json_object(client: OpenAI) -> None:
    wanted: Any = {"type": "json_object"}
    for seed in range(4):
        asked = ASKED | {"max_tokens": 300, "temperature": 2, "seed": seed}
        (choice,) = create(client, **asked, response_format=wanted).choices
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)
        else:
            assert (choice.message.content or "").startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_choices(client: OpenAI, fusion: Fusion, stream: bool) -> None:
    expected = fusion.choose(picture(), "What?", ("yes", "no"))
    asked = {"model": MODEL, "messages": [user()], "stream": stream}
    found: Any = create(client, **asked, extra_body={"fusion": {"choices": ["yes", "no"]}})
    if stream:
        chunks = list(found)
        text, choice = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0]
    else:
        (choice,) = found.choices
        text = choice.message.content
        assert found.usage.completion_tokens == 0
    assert (text, choice.finish_reason) == (expected.text, "stop")
    assert choice.fusion["probabilities"] == pytest.approx(expected.probabilities)
    assert choice.fusion["logprobs"] == pytest.approx(expected.logprobs)
    assert math.fsum(choice.fusion["probabilities"].values()) == pytest.approx(1)
    assert choice.fusion["margin"] == pytest.approx(expected.margin)


def test_a_conversation(client: OpenAI, fusion: Fusion) -> None:
    messages: list[Any] = [user("How many?")]
    first = create(client, **(ASKED | {"messages": messages})).choices[0].message
    messages += [first, {"role": "user", "content": "Where?"}]  # as OpenAI's guides write it
    second = create(client, **(ASKED | {"messages": messages})).choices[0].message
    history = [Turn("How many?", first.content or "")]
    sampling = Sampling(max_new_tokens=LIMIT)
    assert second.content == fusion.answer(picture(), "Where?", history=history, sampling=sampling).text


def test_the_model_s_own_system_text(client: OpenAI, fusion: Fusion) -> None:
    expected = fusion.answer(picture(), "What?", sampling=Sampling(max_new_tokens=LIMIT)).text
    for role in ("system", "developer"):
        for text in ("", "You are a helpful AI assistant."):
            messages = [{"role": role, "content": text}, user()]
            found = create(client, **(ASKED | {"messages": messages}))
            assert found.choices[0].message.content == expected
    with pytest.raises(openai.BadRequestError, match="one system text") as refused:
        create(client, **(ASKED | {"messages": [{"role": "system", "content": "Rhyme."}, user()]}))
    assert (refused.value.param, refused.value.code) == ("messages[0].content", "unsupported_system_text")


def test_details(client: OpenAI, fusion: Fusion) -> None:
    """The bundle has the query lengths 16 (its default) and 4."""

    def tokens(length: int) -> int:
        sampling = Sampling(max_new_tokens=1)
        return fusion.answer(picture(), "What?", query_length=length, sampling=sampling).prompt_tokens

    def found(message: dict[str, Any], **options: Any) -> Any:
        usage = create(client, **(ASKED | {"messages": [message]}), extra_body={"fusion": options}).usage
        assert usage is not None
        return usage.prompt_tokens

    assert tokens(16) - tokens(4) == 12
    assert found(user(detail="auto")) == found(user(detail="high")) == found(user(), detail=16) == tokens(16)
    assert found(user(detail="low")) == found(user(), detail=4) == tokens(4)


def test_a_guide(client: OpenAI, fusion: Fusion) -> None:
    """The second question under a guide runs behind the scene of the first one."""
    sampling = Sampling(max_new_tokens=LIMIT)
    with fusion.look(picture(), guide="Anything?") as scene:
        expected = [scene.answer(question, sampling=sampling).text for question in ("What?", "Where?")]
        choice = scene.choose("Where?", ("yes", "no"))
    texts, cached = [], []
    for question in ("What?", "Where?"):
        asked = ASKED | {"messages": [user(question)]}
        found = create(client, **asked, extra_body={"fusion": {"guide": "Anything?"}})
        texts.append(found.choices[0].message.content)
        cached.append(found.usage.prompt_tokens_details.cached_tokens)
    assert texts == expected
    assert cached[0] == 0
    assert 16 < cached[1] < 60
    options = {"guide": "Anything?", "choices": ["yes", "no"]}
    chosen: Any = create(
        client,
        model=MODEL,
        messages=[user("Where?")],
        extra_body={"fusion": options},
    )
    assert chosen.choices[0].fusion["probabilities"] == pytest.approx(choice.probabilities)


def test_an_evicted_guide_looks_again(client: OpenAI) -> None:
    def ask(seed: int) -> Any:
        asked = ASKED | {"messages": [user("What?", seed)]}
        return create(client, **asked, extra_body={"fusion": {"guide": "Anything?"}})

    first = ask(0)
    for seed in range(1, 4):  # the cache of the fixture's model has one place
        ask(seed)
    again = ask(0)
    assert again.choices[0].message.content == first.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == 0


def test_models(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == (MODEL, "model", "fusion-edge")
    assert client.models.retrieve(MODEL) == listed
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; this server has 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="'other' does not exist") as missing:
        create(client, **(ASKED | {"model": "other"}))
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
