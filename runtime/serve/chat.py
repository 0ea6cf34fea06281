"""``POST /v1/chat/completions``: from a request to an answer, whole or as a stream."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.arguments import short_repr
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.errors import Cancelled, DeadlineExceeded, FusionError
from fusion_edge.runtime.serve.arrival import arrival
from fusion_edge.runtime.serve.body import parse_body
from fusion_edge.runtime.serve.chat_request import LONGEST_DEADLINE_MS, ChatRequest
from fusion_edge.runtime.serve.conversation import read_dialogue
from fusion_edge.runtime.serve.disconnect import until_disconnect
from fusion_edge.runtime.serve.engine import Asked, Engine, Model, late, shutting_down
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.event_stream import EventStream
from fusion_edge.runtime.serve.limits import HELD_BODY, HeldBody
from fusion_edge.runtime.serve.picture_url import PLACEHOLDER, PictureUrl, besides_too_large, cut_url
from fusion_edge.runtime.serve.pictures import Pictures
from fusion_edge.runtime.serve.question import Question, check_fields, is_short, prepare
from fusion_edge.runtime.serve.reply import Reply, Result, to_json
from fusion_edge.runtime.serve.stripped import stripped
from fusion_edge.runtime.serve.workers import Workers

DEADLINE_HEADER = "X-Request-Deadline-Ms"
"""Header with the milliseconds of ``fusion.deadline_ms``; the smaller one counts."""
_SMALL_BODY = 16 << 10
"""Bytes of a body that is parsed at once. A thread parses a larger one, so that other clients do not wait."""
_FAST_BODY = 512 << 10
"""Bytes of a body that is parsed at once, too, if a picture in base64 has all but :data:`_SMALL_BODY` of them."""
_THREADS = 2
"""For bodies; and as many for prompts, and for log-probabilities."""
_LOGGER = logging.getLogger("fusion_edge")


class ChatCompletions:
    """The endpoint, an ASGI application."""

    def __init__(self, model_name: str, pictures: Pictures) -> None:
        """The pictures stay the caller's to close."""
        self._model_name = model_name
        self._pictures = pictures
        self._parsers, self._prompts = Workers(_THREADS, "parse"), Workers(_THREADS, "prompt")
        self._writers = Workers(_THREADS, "logprobs")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or raise :class:`ApiError` before anything is sent."""
        headers = Headers(scope=scope)
        _check_content_type(headers)
        header_ms = _deadline_header(headers)
        request, url = await self._read(receive)
        field_ms = request.fusion.deadline_ms if request.fusion is not None else None
        due = arrival(scope) + min(math.inf if ms is None else ms / 1000 for ms in (header_ms, field_ms))
        work = self._respond(request, url, due, scope, receive, send)
        del request, url  # they have the picture
        await until_disconnect(receive, work)

    def close(self) -> None:
        """Let the threads end after their request."""
        self._parsers.close()
        self._prompts.close()
        self._writers.close()

    async def _read(self, receive: Receive) -> tuple[ChatRequest, PictureUrl | None]:
        """Return the request of a body that :class:`.LimitRequests` has received, and the URL of a large picture.

        Nothing but that URL keeps the body itself.
        """
        body: bytes = (await receive())["body"]
        if is_fast(body):
            return _parse(body)
        return await self._parsers.run(_parse, body)

    async def _respond(
        self, request: ChatRequest, url: PictureUrl | None, due: float, scope: Scope, receive: Receive, send: Send
    ) -> None:
        engine: Engine = scope["app"].state.engine
        if request.model != self._model_name:
            raise unknown_model(request.model, self._model_name)
        check_fields(request)
        model = engine.model()
        prepare_it = partial(self._prepare, model, request, url, scope[HELD_BODY])
        question, asked = await engine.submit(prepare_it, due, arrival(scope))
        reply, is_stream = Reply(request, question, model.logprobs.write), request.stream
        del prepare_it, request, url  # an answer may take minutes; they have the picture
        try:
            if is_stream:
                await _stream(reply, asked, send, self._writers)
            else:
                result = await _result(asked)
                content = await reply.written(lambda: reply.completion(result), self._writers)
                headers = {"X-Request-Id": reply.id}
                response = Response(content, media_type="application/json", headers=headers)
                await response(scope, receive, send)
        finally:
            asked.cancel()  # the client has left; nothing once it has ended

    async def _prepare(self, model: Model, request: ChatRequest, url: PictureUrl | None, held: HeldBody) -> Question:
        fusion = model.fusion
        dialogue = read_dialogue(request.messages, TEMPLATES[fusion.config.template].system_text)
        held.own()
        try:
            if url is None:
                url = PictureUrl(dialogue.image.url)
            elif dialogue.image.url != PLACEHOLDER:
                raise besides_too_large()
            picture = await self._pictures.load(url, dialogue.image_path)
        finally:
            held.release()
        if is_short(request, dialogue):
            return prepare(fusion, request, dialogue, picture)
        return await self._prompts.run(prepare, fusion, request, dialogue, picture)


def is_fast(body: bytes) -> bool:
    """Return whether a body is parsed within a millisecond or so, so that an event loop may do it.

    One long string without escapes costs little, many values cost much.
    """
    if not _SMALL_BODY < len(body) <= _FAST_BODY:
        return len(body) <= _SMALL_BODY
    start = max(0, body.find(b"base64,"))
    end = body.find(b'"', start)
    return len(body) - (end - start) <= _SMALL_BODY and body.find(b"\\", start, end) < 0


def _parse(body: bytes) -> tuple[ChatRequest, PictureUrl | None]:
    rest, url = cut_url(body)
    return parse_body(rest, ChatRequest), url


def unknown_model(given: str, served: str) -> ApiError:
    """Return the error of a model's id that is not served."""
    message = f"The model {short_repr(given)} does not exist; this server has {served!r}."
    return ApiError(404, message, "model", "model_not_found")


async def _stream(reply: Reply, asked: Asked, send: Send, writers: Workers) -> None:
    """Send an answer as it is generated. An error before its first piece is raised; a later one is an event."""
    events = EventStream(send, {"X-Request-Id": reply.id, "X-Accel-Buffering": "no"})
    try:
        async for piece in stripped(_pieces(asked)):
            if not events.has_begun:
                await events.send(to_json(reply.start()))
            await events.send(to_json(reply.piece(piece)))
        result = await _result(asked)
        if not events.has_begun:  # an answer without text
            await events.send(to_json(reply.start()))
        await events.send(await reply.written(lambda: reply.end(result), writers))
        if (usage := reply.usage(result)) is not None:
            await events.send(to_json(usage))
        await events.send(b"[DONE]")
    except Exception as error:
        if not events.has_begun:
            raise
        if not isinstance(error, ApiError):
            _LOGGER.exception("A stream failed.")
            error = ApiError(500, "The server failed; see its messages.")
        await events.send(json.dumps(error.body()).encode())
    await events.end()


async def _pieces(asked: Asked) -> AsyncIterator[str]:
    with suppress(FusionError):  # :func:`_result` raises it
        async for piece in asked:
            yield piece


async def _result(asked: Asked) -> Result:
    """Wait for an answer. Raise :class:`ApiError` for one that a deadline, a shutdown or the model ended."""
    try:
        result = await asked
    except DeadlineExceeded as error:
        raise late(f"in stage {error.stage!r}") from None
    except Cancelled:
        raise shutting_down() from None
    except FusionError as error:
        raise ApiError(500, str(error), code="model_error") from None
    if isinstance(result, Answer) and result.finish_reason == "cancelled":
        raise shutting_down()
    return result


def _check_content_type(headers: Headers) -> None:
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        message = f"The content type is {short_repr(given)}; expected application/json."
        raise ApiError(415, message, code="unsupported_media_type")


def _deadline_header(headers: Headers) -> float | None:
    """Return the milliseconds of the deadline header; None without one."""
    text = headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= LONGEST_DEADLINE_MS):
        expected = f"expected an integer from 1 to {LONGEST_DEADLINE_MS}"
        raise ApiError(400, f"{DEADLINE_HEADER} is {short_repr(text)}; {expected}.", DEADLINE_HEADER, "invalid_value")
    return float(text)
