"""Structured answers: grammars among the options of a question, and the document of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.constraints.grammar import Grammar
from fusion_edge.runtime.errors import Cancelled, DeadlineExceeded, FusionError, UsageError
from fusion_edge.runtime.sampling import Sampling
from fusion_edge.runtime.stages import DECODE_STEP

if TYPE_CHECKING:
    from fusion_edge.runtime.requests import SamplingOptions


def with_grammar(
    sampling: Sampling | None,
    *,
    schema: Grammar | None = None,
    regex: str | None = None,
    choices: Iterable[str] | None = None,
) -> Sampling:
    """Return ``sampling`` with the grammar of the option that is given. Raise :class:`UsageError` for two grammars."""
    sampling = Sampling() if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise UsageError(f"sampling is of type {type(sampling).__name__}; expected a Sampling.")
    grammars = {
        "schema": schema,
        "regex": None if regex is None else Grammar.regex(regex),
        "choices": None if choices is None else Grammar.choices(choices),
        "sampling.grammar": sampling.grammar,
    }
    given = [name for name, grammar in grammars.items() if grammar is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; pass one of them.")
    return replace(sampling, grammar=grammars[given[0]]) if given else sampling


def document_sampling(options: SamplingOptions, schema: dict[str, Any]) -> Sampling:
    """Return the sampling of a document: that of ``options``, with ``schema`` as its only grammar."""
    sampling, regex, choices = options.get("sampling"), options.get("regex"), options.get("choices")
    return with_grammar(sampling, schema=Grammar.json(schema), regex=regex, choices=choices)


def document(answer: Answer) -> Any:
    """Return the JSON document of a constrained answer.

    Raises:
        DeadlineExceeded: A deadline cut the answer.
        Cancelled: The answer was canceled.
        FusionError: The answer reached its token limit.
    """
    place = f"after {len(answer.token_ids)} tokens, within the JSON document"
    if answer.finish_reason == "deadline":
        raise DeadlineExceeded(f"The deadline passed {place}; allow more time.", DECODE_STEP, answer)
    if answer.finish_reason == "cancelled":
        raise Cancelled(f"The question was cancelled {place}; ask it again.", DECODE_STEP, answer)
    if answer.finish_reason == "length":
        raise FusionError(
            f"The answer was cut {place}; raise max_new_tokens or the bundle's context, or limit strings and arrays "
            "with maxLength and maxItems."
        )
    return json.loads(answer.text)
