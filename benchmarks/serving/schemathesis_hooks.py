"""Hooks of schemathesis: most valid requests become ones that the model answers, and every response is counted.

Set as SCHEMATHESIS_HOOKS by :mod:`.generated_requests`.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis

from fusion_edge.benchmarks.serving.generated_requests import has_deadline
from fusion_edge.runtime.serve.chat import DEADLINE_HEADER

KEPT = 0.1
"""Share of the optional fields that an answerable request keeps: many of them exclude each other."""
LONG_MS = 60_000
"""A deadline that no answer misses. Most generated ones are some milliseconds."""
_NUMBERS = itertools.count()
_MESSAGES = json.loads(os.environ["FUSION_MESSAGES"])
_COUNTS: Counter[str] = Counter()
_REQUIRED = ("model", "messages")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Make three of four valid questions answerable."""
    is_valid = case.meta is not None and case.meta.generation.mode == schemathesis.GenerationMode.POSITIVE
    if is_valid and isinstance(case.body, dict) and (number := next(_NUMBERS)) % 4:
        case.body = answerable(case.body, number)
        for name in [name for name in case.headers or {} if name.lower() == DEADLINE_HEADER.lower()]:
            del case.headers[name]


def answerable(body: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a valid body with a readable picture and few of its optional fields, drawn by a number."""
    chance = random.Random(number)
    kept = {name: value for name, value in body.items() if name in _REQUIRED or chance.random() < KEPT}
    if isinstance(kept.get("fusion"), dict):
        kept["fusion"] = {name: value for name, value in kept["fusion"].items() if chance.random() < KEPT}
        if kept["fusion"].get("deadline_ms") is not None and number % 4 != 1:
            kept["fusion"]["deadline_ms"] = LONG_MS
    return kept | {"messages": _MESSAGES}


@schemathesis.check
def server_error_without_reason(context: Any, response: Any, case: Any) -> None:
    """Count a response. The status 504 is right where the request has a deadline; no other server error is."""
    status = response.status_code
    _COUNTS[f"{case.operation.label} {status}"] += 1
    if status >= 500 and not (status == 504 and has_deadline(case.headers, case.body)):
        raise AssertionError(f"{case.operation.label} answers with the status {status}.")


@atexit.register
def _write_counts() -> None:
    Path(os.environ["FUSION_COUNTS"]).write_text(json.dumps(dict(sorted(_COUNTS.items()))))
