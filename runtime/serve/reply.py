"""Builds the response objects of one request."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from pydantic import BaseModel

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.choices import Choice
from fusion_edge.runtime.serve.chat_request import ChatRequest
from fusion_edge.runtime.serve.chat_response import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChunkChoice,
    CompletionChoice,
    Delta,
    FinishReason,
    FusionResult,
    Logprobs,
    PromptDetails,
    Usage,
)
from fusion_edge.runtime.serve.question import Question
from fusion_edge.runtime.serve.workers import Workers

Result = Answer | Choice


def to_json(response: BaseModel) -> bytes:
    """Return a response without the fields that were not set."""
    return response.model_dump_json(exclude_unset=True).encode()


class Reply:
    """The response to one request, whole or in chunks."""

    def __init__(self, request: ChatRequest, question: Question, write: Callable[[Answer, int], Logprobs]) -> None:
        """``write`` returns the log-probabilities of an answer, with a number of likeliest tokens."""
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        # Not the request, whose picture and texts are not needed any more.
        self._model = request.model
        self._sends_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        self._top = (request.top_logprobs or 0) if request.logprobs else None
        self._question = question
        self._write = write

    async def written(self, build: Callable[[], BaseModel], workers: Workers) -> bytes:
        """Return what :meth:`completion` or :meth:`end` builds as JSON.

        Log-probabilities are written by the workers: 512 tokens with 20 each take 0.15 s, and the first ones read the
        vocabulary.
        """
        if self._top is None:
            return to_json(build())
        return await workers.run(lambda: to_json(build()))

    def completion(self, result: Result) -> ChatCompletion:
        """Return the whole answer."""
        choice = CompletionChoice(
            index=0,
            message=AnswerMessage(role="assistant", content=result.text, refusal=None),
            logprobs=self._logprobs(result),
            finish_reason=finish_reason(result),
            **_extension(result),
        )
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[choice],
            usage=self._usage(result),
        )

    def start(self) -> ChatCompletionChunk:
        """Return the first chunk, without text."""
        return self._chunk(
            ChunkChoice(index=0, delta=Delta(role="assistant", content=""), logprobs=None, finish_reason=None)
        )

    def piece(self, text: str) -> ChatCompletionChunk:
        """Return a chunk with text."""
        return self._chunk(ChunkChoice(index=0, delta=Delta(content=text), logprobs=None, finish_reason=None))

    def end(self, result: Result) -> ChatCompletionChunk:
        """Return the chunk after the text: why it ended, and the log-probabilities of all tokens."""
        return self._chunk(
            ChunkChoice(
                index=0,
                delta=Delta(),
                logprobs=self._logprobs(result),
                finish_reason=finish_reason(result),
                **_extension(result),
            )
        )

    def usage(self, result: Result) -> ChatCompletionChunk | None:
        """Return the last chunk, with the usage; None if it was not asked for."""
        return self._chunk(usage=self._usage(result)) if self._sends_usage else None

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=list(choices),
            **({"usage": usage} if self._sends_usage else {}),
        )

    def _usage(self, result: Result) -> Usage:
        generated = len(result.token_ids) if isinstance(result, Answer) else 0
        return Usage(
            prompt_tokens=result.prompt_tokens,
            completion_tokens=generated,
            total_tokens=result.prompt_tokens + generated,
            prompt_tokens_details=PromptDetails(cached_tokens=self._question.cached_tokens),
        )

    def _logprobs(self, result: Result) -> Logprobs | None:
        return self._write(result, self._top) if self._top is not None and isinstance(result, Answer) else None


def finish_reason(result: Result) -> FinishReason:
    """Return OpenAI's finish reason. A deadline is ``length``, because clients know no other one that fits."""
    return "stop" if isinstance(result, Choice) or result.finish_reason == "stop" else "length"


def _extension(result: Result) -> dict[str, FusionResult]:
    """Return the field ``fusion`` of a choice, if there is something to say."""
    if isinstance(result, Choice):
        return {
            "fusion": FusionResult(probabilities=result.probabilities, logprobs=result.logprobs, margin=result.margin)
        }
    return {"fusion": FusionResult(finish_reason="deadline")} if result.finish_reason == "deadline" else {}
