"""The body of ``POST /v1/chat/completions``. Names are OpenAI's; what only FUSION has is in ``fusion``.

This is the one definition: it validates requests, and the OpenAPI document is generated from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from fusion_edge.runtime.choices import MAX_CHOICES
from fusion_edge.runtime.sampling import MAX_LOGPROBS, Sampling
from fusion_edge.runtime.serve.fields import Fields, Only, by_field, by_type

LONGEST_DEADLINE_MS = 24 * 3600 * 1000
"""A day."""
MAX_PARTS = 256
"""Parts of a message."""

_NO_NAME = Only(remedy="the template has no names; leave it out")
_NO_TOOLS = Only(remedy="FUSION calls no tools; leave it out")
_EMPTY_TOOLS = Only([], remedy="FUSION calls no tools; leave it out")
_TOOL_CHOICE = Only("none", "auto", remedy="FUSION calls no tools; leave it out")
_NO_PENALTY = Only(0, remedy="sampling has temperature and top_p; leave it out")
_NOT_WRITTEN = Only(remedy="FUSION's answers have none; leave it out")


class TextPart(Fields):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ImageUrl(Fields):
    """Where the picture is, and how closely to look."""

    url: Annotated[str, Field(min_length=1, description="URL of an image file; a data URL holds the file itself.")]
    detail: Annotated[
        Literal["auto", "low", "high"] | None,
        Field(description="Latents: low is the bundle's smallest query length, high the largest, auto the default."),
    ] = None


class ImagePart(Fields):
    """A part of a message: the picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Text = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<parts>")],
    by_type(text=str, parts=list),
]
Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    by_field("type", "text", "image_url"),
]


class SystemMessage(Fields):
    """System text. FUSION's is fixed: this is the model's own, or empty."""

    role: Literal["system"]
    content: Text
    name: Annotated[None, _NO_NAME] = None


class DeveloperMessage(Fields):
    """OpenAI's newer name of a system message."""

    role: Literal["developer"]
    content: Text
    name: Annotated[None, _NO_NAME] = None


class UserMessage(Fields):
    """A question. The first one has the picture."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<parts>")],
        by_type(text=str, parts=list),
    ]
    name: Annotated[None, _NO_NAME] = None


class AssistantMessage(Fields):
    """An earlier answer, also as a response had it."""

    role: Literal["assistant"]
    content: Text
    name: Annotated[None, _NO_NAME] = None
    refusal: Annotated[None, _NOT_WRITTEN] = None
    annotations: Annotated[None, Only([], remedy="FUSION's answers have none; leave it out")] = None
    audio: Annotated[None, _NOT_WRITTEN] = None
    tool_calls: Annotated[None, _EMPTY_TOOLS] = None
    function_call: Annotated[None, _NO_TOOLS] = None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[DeveloperMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")],
    by_field("role", "system", "developer", "user", "assistant"),
]


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: Annotated[bool | None, Field(description="Send a last chunk with the usage.")] = None
    include_obfuscation: Annotated[None, Only(False, remedy="chunks are not padded; leave it out")] = None


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Fields):
    """A JSON object of any keys, nested at most two levels deep."""

    type: Literal["json_object"]


class JsonSchema(Fields):
    """A JSON schema. It is always enforced."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: Annotated[
        dict[str, Any], Field(alias="schema", description="Keywords as in the guide; others are refused.")
    ]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Fields):
    """A JSON document that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by_field("type", "text", "json_object", "json_schema"),
]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")] | Annotated[list[StopText], Field(max_length=4), Tag("<texts>")],
    by_type(text=str, texts=list),
]


class FusionOptions(Fields):
    """What only FUSION has."""

    choices: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | None,
        Field(min_length=2, max_length=MAX_CHOICES, description="Answer with the likeliest of these texts."),
    ] = None
    guide: Annotated[
        str | None, Field(description="Text that guides the vision encoder in place of the questions.")
    ] = None
    detail: Annotated[int | None, Field(ge=1, description="Query length, one that the bundle offers.")] = None
    deadline_ms: Annotated[
        int | None,
        Field(ge=1, le=LONGEST_DEADLINE_MS, description="Milliseconds from the request's arrival to the answer's end."),
    ] = None


class ChatRequest(Fields):
    """A conversation about one picture, which ends with a question."""

    model: Annotated[str, Field(description="Id of the served model.")]
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[
        int | None, Field(ge=1, description=f"Limit of generated tokens; {Sampling().max_new_tokens} by default.")
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Older name of max_completion_tokens.")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0, the default, is greedy.")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[Stop | None, Field(description="Texts that end the answer and are not part of it.")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    fusion: FusionOptions | None = None
    n: Annotated[None, Only(1, remedy="ask again for another answer")] = None

    user: Annotated[str | None, Field(description="No effect.")] = None
    safety_identifier: Annotated[str | None, Field(description="No effect.")] = None
    prompt_cache_key: Annotated[str | None, Field(description="No effect.")] = None
    metadata: Annotated[dict[str, str] | None, Field(max_length=16, description="No effect: nothing is stored.")] = None
    store: Annotated[None, Only(False, remedy="nothing is stored; leave it out")] = None
    service_tier: Annotated[None, Only("auto", "default", remedy="there is one tier; leave it out")] = None
    modalities: Annotated[None, Only(["text"], remedy="FUSION answers with text; leave it out")] = None
    frequency_penalty: Annotated[None, _NO_PENALTY] = None
    presence_penalty: Annotated[None, _NO_PENALTY] = None
    logit_bias: Annotated[None, Only({}, remedy="use fusion.choices or response_format in its place")] = None
    tools: Annotated[None, _EMPTY_TOOLS] = None
    tool_choice: Annotated[None, _TOOL_CHOICE] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="No effect: FUSION calls no tools.")] = None
    functions: Annotated[None, _EMPTY_TOOLS] = None
    function_call: Annotated[None, _TOOL_CHOICE] = None
