"""From text to token ids: the tokenizer, the prompt's template and its image markers."""

from __future__ import annotations

from fusion_edge.runtime.prompts.prompt import TEMPLATES, Turn, encode_prompt

__all__ = ["TEMPLATES", "Turn", "encode_prompt"]
