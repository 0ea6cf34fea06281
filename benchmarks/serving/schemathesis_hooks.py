"""Hooks of schemathesis: half of the valid requests get a readable picture, so that the model answers them.

Set as SCHEMATHESIS_HOOKS by :mod:`.generated_requests`.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import schemathesis

_NUMBERS = itertools.count()
MESSAGES = json.loads(os.environ["FUSION_MESSAGES"])


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replace the messages of every second valid body."""
    if isinstance(body, dict) and next(_NUMBERS) % 2 and isinstance(body.get("messages"), list):
        return body | {"messages": MESSAGES}
    return body
