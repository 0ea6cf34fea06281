"""From a conversation to a prompt: templates, image markers and positions."""

from __future__ import annotations

from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.prompts.prompt import Turn, encode_prompt

__all__ = ["TEMPLATES", "Turn", "encode_prompt"]
