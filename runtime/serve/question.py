"""A request as the model takes it: arguments checked and tokenized, and what the worker runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.answer_stream import AnswerStream
from fusion_edge.runtime.choices import Choice, PreparedChoices, choose, prepare_choices
from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.image_cache import CacheEntry
from fusion_edge.runtime.loop.request import Request
from fusion_edge.runtime.requests import PreparedLook, PreparedQuestion
from fusion_edge.runtime.run_control import RunControl
from fusion_edge.runtime.sampling import Sampling
from fusion_edge.runtime.serve.chat_request import ChatRequest, FusionOptions, JsonObjectFormat, JsonSchemaFormat
from fusion_edge.runtime.serve.conversation import Dialogue
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.json_object import JSON_OBJECT
from fusion_edge.runtime.serve.pictures import Picture

_GENERATION = (
    "max_completion_tokens", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs"
)  # fmt: skip

_SHORT = 1000
"""Characters of a prompt. Its tokens take 0.2 ms."""


@dataclass(eq=False)
class Question:
    """A question that is ready for the worker."""

    prepared: PreparedQuestion | PreparedChoices
    look: PreparedLook | None
    """The look at the picture under a guide; None without a guide."""
    scene: tuple[str, str, int] | None
    """Digest of the picture, guide and query length; None without a guide."""
    cached_tokens: int = 0
    """Tokens of the prompt that the scene had already run. The worker sets it."""


def check_fields(request: ChatRequest) -> None:
    """Raise :class:`ApiError` for fields that exclude each other."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true; add it, or leave them out.", "stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true; add it, or leave it out.", "top_logprobs")
    if None not in (limits := (request.max_completion_tokens, request.max_tokens)) and limits[0] != limits[1]:
        raise ApiError(400, "max_tokens differs from max_completion_tokens; leave it out.", "max_tokens")
    has_format = request.response_format is not None and request.response_format.type != "text"
    if has_format and request.stop:
        raise ApiError(400, "stop excludes response_format, which says where an answer ends; leave it out.", "stop")
    if request.fusion is not None and request.fusion.choices is not None:
        given = [name for name in _GENERATION if (value := getattr(request, name)) is not None and value is not False]
        if has_format:
            given.append("response_format")
        if given:
            message = f"{given[0]} has no effect with fusion.choices, which generates no answer; leave it out."
            raise ApiError(400, message, given[0])


def is_short(request: ChatRequest, dialogue: Dialogue) -> bool:
    """Return whether :func:`prepare` takes less than a millisecond, so that an event loop may call it."""
    options, wanted = request.fusion or FusionOptions(), request.response_format
    texts = [dialogue.question, options.guide or "", *(turn.question + turn.answer for turn in dialogue.history)]
    has_format = wanted is not None and wanted.type != "text"
    return not has_format and options.choices is None and sum(map(len, texts)) <= _SHORT


def prepare(fusion: Fusion, request: ChatRequest, dialogue: Dialogue, picture: Picture) -> Question:
    """Check the arguments of a request and tokenize its prompt. Runs no graph. Any thread may call this.

    Raises :class:`ApiError` with the field that the model does not take.
    """
    options, pipeline = request.fusion or FusionOptions(), fusion.pipeline
    length = _query_length(fusion, options.detail, dialogue.image.detail, dialogue.image_path)
    grammar = _grammar(request)
    sampling = _sampling(request, grammar)
    constraint = None
    if grammar is not None:
        with _about("response_format"):
            constraint = pipeline.grammars.start(grammar)
    with _about("messages"):
        plain = replace(sampling, grammar=None)
        asked = pipeline.prepare(picture.crops, dialogue.question, dialogue.history, plain, length)
    prepared: PreparedQuestion | PreparedChoices = replace(asked, sampling=sampling, constraint=constraint)
    if options.choices is not None:
        with _about("fusion.choices"):
            (prepared,) = prepare_choices(
                pipeline, picture.crops, [dialogue.question], options.choices, dialogue.history, length
            )
    if options.guide is None:
        return Question(prepared, None, None)
    with _about("fusion.guide"):
        look = pipeline.prepare_look(picture.crops, options.guide, length)
    return Question(prepared, look, (picture.digest, options.guide, length))


def _query_length(fusion: Fusion, wanted: int | None, detail: str | None, path: str) -> int:
    offered = fusion.manifest.query_lengths
    if wanted is not None:
        if detail in ("low", "high"):
            message = f"fusion.detail and {path.removesuffix('.url')}.detail exclude each other; leave one out."
            raise ApiError(400, message, "fusion.detail")
        with _about("fusion.detail"):
            return fusion.query_length(wanted)
    return {"low": min(offered), "high": max(offered)}.get(detail or "auto", offered[0])


def _grammar(request: ChatRequest) -> Grammar | None:
    wanted = request.response_format
    if not isinstance(wanted, JsonObjectFormat | JsonSchemaFormat):
        return None
    if find_spec("llguidance") is None:
        message = "response_format needs llguidance on the server; run pip install '.[constrained]' there."
        raise ApiError(501, message, "response_format", "not_installed")
    if isinstance(wanted, JsonObjectFormat):
        return JSON_OBJECT
    with _about("response_format.json_schema.schema"):
        return Grammar.json(wanted.json_schema.schema_)


def _sampling(request: ChatRequest, grammar: Grammar | None) -> Sampling:
    """Return the sampling of a request: what is absent has the default of :class:`Sampling`."""
    default = Sampling()
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    limit = request.max_completion_tokens or request.max_tokens or default.max_new_tokens
    return Sampling(
        max_new_tokens=limit,
        temperature=default.temperature if request.temperature is None else request.temperature,
        top_p=default.top_p if request.top_p is None else request.top_p,
        seed=None if request.seed is None else request.seed % 2**64,  # NumPy's seeds are not negative
        stop=stop,
        grammar=grammar,
        logprobs=request.top_logprobs or 0,
    )


@contextmanager
def _about(param: str) -> Iterator[None]:
    """Turn an error of the model's arguments into one about a field."""
    try:
        yield
    except FusionError as error:
        raise ApiError(400, f"{param}: {error}", param) from None


class Runner:
    """Runs questions on a model, in the worker's thread alone. Keeps the scenes of guides."""

    def __init__(self, fusion: Fusion, scenes: int) -> None:
        self._fusion = fusion
        self._limit = scenes
        self._scenes: OrderedDict[tuple[str, str, int], CacheEntry] = OrderedDict()
        """Least recently used first."""

    def run(self, question: Question, request: Request[Answer | Choice]) -> Answer | Choice:
        """Answer a question under the control of its request, and push the pieces. Raises as :meth:`Fusion.answer`."""
        control, prepared = request.control, question.prepared
        pipeline, queue = self._fusion.pipeline, self._fusion.queue
        asked = prepared if isinstance(prepared, PreparedQuestion) else prepared.question
        entry = self._scene(question, asked, control)
        if entry is not None:
            asked = replace(asked, subject=entry)
        if isinstance(prepared, PreparedQuestion):
            return queue.run(lambda: AnswerStream(pipeline, queue, asked, control).complete(request.push), control)

        def chosen() -> Choice:
            queue.start(control)
            return choose(pipeline, replace(prepared, question=asked), control)

        choice = queue.run(chosen, control)
        request.push(choice.text)
        return choice

    def _scene(self, question: Question, asked: PreparedQuestion, control: RunControl) -> CacheEntry | None:
        """Return the scene of a guide, from the cache unless it was evicted; None without a guide."""
        pipeline, queue, look, key = self._fusion.pipeline, self._fusion.queue, question.look, question.scene
        if look is None or key is None:
            return None
        entry = self._scenes.pop(key, None)
        if entry is not None and entry.image is not None:
            layout = asked.prompt.layout(pipeline.manifest.image_side**2, asked.query_length)
            question.cached_tokens = layout.image_end
        else:

            def seen() -> CacheEntry:
                queue.start(control)
                return pipeline.look(look, control.stage_hook)

            entry = queue.run(seen, control)
        self._scenes[key] = entry
        if len(self._scenes) > self._limit:
            self._scenes.popitem(last=False)[1].close()
        return entry
