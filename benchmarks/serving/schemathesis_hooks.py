"""Hooks of schemathesis: half of the valid requests get a readable picture, so that the model answers them.

Set as SCHEMATHESIS_HOOKS by :mod:`.generated_requests`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis

MESSAGES = json.loads(os.environ["FUSION_MESSAGES"])


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replace the messages of every second valid body."""
    map_body.calls += 1
    if isinstance(body, dict) and map_body.calls % 2 and isinstance(body.get("messages"), list):
        return body | {"messages": MESSAGES}
    return body


map_body.calls = 0
