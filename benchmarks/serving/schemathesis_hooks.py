"""Hooks of schemathesis: half of the valid requests get a readable picture, so that the model answers them.

Set as SCHEMATHESIS_HOOKS by :mod:`.generated_requests`.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import schemathesis
from pydantic import ValidationError

from fusion_edge.runtime.serve.chat_request import ChatRequest

_NUMBERS = itertools.count()
MESSAGES = json.loads(os.environ["FUSION_MESSAGES"])


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replace the messages of every second valid body; an invalid one would become valid."""
    if next(_NUMBERS) % 2 == 0:
        return body
    try:
        ChatRequest.model_validate(body)
    except ValidationError:
        return body
    return body | {"messages": MESSAGES}
