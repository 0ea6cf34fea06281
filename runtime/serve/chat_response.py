"""Responses of ``POST /v1/chat/completions``, which the OpenAPI document describes, too.

They are written without the fields that were not set: only those that may be absent have defaults.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class TopLogprob(BaseModel):
    """A token, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A generated token with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log-probabilities of the answer's tokens, at temperature 1."""

    content: list[TokenLogprob]
    refusal: None


class PromptDetails(BaseModel):
    """Parts of the prompt."""

    cached_tokens: Annotated[int, Field(description="Tokens that the guide's scene had run before.")]


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: Annotated[int, Field(description="Text, image tokens and latents.")]
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class FusionResult(BaseModel):
    """What only FUSION has. Fields that do not apply are absent."""

    finish_reason: Annotated[
        Literal["deadline"] | None, Field(description="The deadline cut the answer; finish_reason is length.")
    ] = None
    probabilities: Annotated[dict[str, float] | None, Field(description="By choice; their sum is 1.")] = None
    logprobs: Annotated[dict[str, float] | None, Field(description="By choice, not normalized.")] = None
    margin: Annotated[float | None, Field(description="Difference of the two largest probabilities.")] = None


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """The answer, and why it ended."""

    index: Literal[0]
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason
    fusion: FusionResult | None = None


class ChatCompletion(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Delta(BaseModel):
    """The next piece of the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of the answer. The last one has the finish reason and the log-probabilities of all tokens."""

    index: Literal[0]
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    fusion: FusionResult | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Annotated[Usage | None, Field(description="In the last chunk, which has no choice.")] = None
