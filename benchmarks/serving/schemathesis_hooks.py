"""Hooks of schemathesis: half of the valid requests get a readable picture, so that the model answers them.

Set as SCHEMATHESIS_HOOKS by :mod:`.generated_requests`.
"""

from __future__ import annotations

import json
import os
from itertools import cycle
from typing import Any

import schemathesis

MESSAGES = json.loads(os.environ["FUSION_MESSAGES"])
_IS_REPLACED = cycle((True, False))


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replace the messages of every second valid body."""
    is_replaced = next(_IS_REPLACED)
    if is_replaced and isinstance(body, dict) and isinstance(body.get("messages"), list):
        return body | {"messages": MESSAGES}
    return body
