"""Conversation templates (docs/fusion-model.md section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Template:
    """Text around the questions and answers of a conversation."""

    system: str
    question_start: str
    question_end: str
    answer_start: str
    answer_end: str

    @property
    def system_text(self) -> str:
        """The system text alone, without control tokens."""
        return self.system.removesuffix(self.question_end).rpartition("\n")[2]


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        "phi_3": Template(
            system="<|system|>\nYou are a helpful AI assistant.<|end|>",
            question_start="\n<|user|>\n",
            question_end="<|end|>",
            answer_start="\n<|assistant|>\n",
            answer_end="<|end|>",
        ),
        "llama_3": Template(
            system="<|start_header_id|>system<|end_header_id|>\n\n"
            "You are a helpful, highly intelligent language and vision assistant. "
            "You are able to understand the visual content that the user provides, and assist the user with a "
            "variety of tasks using natural language. Whenever an image is present in the conversation, very "
            "carefully examine it and consider its content when formulating your response.<|eot_id|>",
            question_start="<|start_header_id|>user<|end_header_id|>\n\n",
            question_end="<|eot_id|>",
            answer_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
            answer_end="<|eot_id|>",
        ),
    }
)
"""Templates by the name in ``FusionConfig.template``."""
