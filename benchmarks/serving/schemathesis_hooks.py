"""Hooks of schemathesis: most valid requests become ones that the model answers, and every response is counted.

Set as SCHEMATHESIS_HOOKS by :mod:`.generated_requests`.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from pydantic import ValidationError

from fusion_edge.runtime.serve.chat import DEADLINE_HEADER
from fusion_edge.runtime.serve.chat_request import ChatRequest

KEPT = 0.2
"""Share of the optional fields that an answerable request keeps: many of them exclude each other."""
LONG_MS = 60_000
"""A deadline that no answer misses."""
_NUMBERS = itertools.count()
_MESSAGES = json.loads(os.environ["FUSION_MESSAGES"])
_COUNTS: Counter[str] = Counter()
_REQUIRED = ("model", "messages")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Make three of four valid bodies answerable; an invalid one would become valid."""
    number = next(_NUMBERS)
    if number % 4 == 0:
        return body
    try:
        ChatRequest.model_validate(body)
    except ValidationError:
        return body
    chance = random.Random(number)
    kept = {name: value for name, value in body.items() if name in _REQUIRED or chance.random() < KEPT}
    if isinstance(kept.get("fusion"), dict):
        kept["fusion"] = {name: value for name, value in kept["fusion"].items() if chance.random() < KEPT}
        if kept["fusion"].get("deadline_ms") is not None and number % 4 != 1:
            kept["fusion"]["deadline_ms"] = LONG_MS
    return kept | {"messages": _MESSAGES}


@schemathesis.hook
def map_headers(context: Any, headers: Any) -> Any:
    """Give three of four valid deadlines enough time; most that are generated are some milliseconds."""
    number = next(_NUMBERS)
    if number % 4 == 0 or not isinstance(headers, dict):
        return headers
    valid = {name: value for name, value in headers.items() if name.lower() == DEADLINE_HEADER.lower()}
    times = {name: str(LONG_MS) for name, value in valid.items() if re.fullmatch("[1-9][0-9]{0,7}", str(value))}
    return headers | times


@schemathesis.check
def server_error_without_reason(context: Any, response: Any, case: Any) -> None:
    """Count a response. The status 504 is right where the request has a deadline; no other server error is."""
    status = response.status_code
    _COUNTS[f"{case.operation.label} {status}"] += 1
    if status >= 500 and not (status == 504 and has_deadline(case.headers, case.body)):
        raise AssertionError(f"{case.operation.label} answers with the status {status}.")


def has_deadline(headers: Any, body: Any) -> bool:
    """Return whether a request has a deadline, in its header or in its body."""
    if any(name.lower() == DEADLINE_HEADER.lower() for name in headers or {}):
        return True
    options = body.get("fusion") if isinstance(body, dict) else None
    return isinstance(options, dict) and options.get("deadline_ms") is not None


@atexit.register
def _write_counts() -> None:
    Path(os.environ["FUSION_COUNTS"]).write_text(json.dumps(dict(sorted(_COUNTS.items()))))
