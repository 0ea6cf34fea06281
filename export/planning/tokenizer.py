"""The tokenizer of a bundle, checked against the model."""

from __future__ import annotations

import dataclasses

from tokenizers import Tokenizer

from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.errors import FusionError


def read_tokenizer(checkpoint: Checkpoint, config: FusionConfig) -> str:
    """Return ``tokenizer.json``. Raises :class:`FusionError` for a token id beyond the token table."""
    content = tokenizer_json(checkpoint.folder)
    vocabulary: dict[str, int] = Tokenizer.from_str(content).get_vocab()
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= config.language.vocab_size:
        raise FusionError(
            f"The tokenizer of {checkpoint.folder} gives {token!r} the id {largest}, but vocab_size is "
            f"{config.language.vocab_size}; take tokenizer and weights from the same checkpoint."
        )
    return content


def with_end_tokens(checkpoint: Checkpoint, config: FusionConfig, tokenizer: str) -> FusionConfig:
    """Return ``config`` with the template's end of turn appended to its end tokens, unless it is among them.

    Raises :class:`FusionError` if there is no end token at all.
    """
    name = TEMPLATES[config.template].answer_end
    end: int | None = Tokenizer.from_str(tokenizer).token_to_id(name)
    if end is None and not config.eos_token_ids:
        raise FusionError(
            f"The tokenizer of {checkpoint.folder} has no {name}, which ends an answer, and no eos_token_id is given; "
            "add one to generation_config.json, or take the tokenizer of the FUSION checkpoint."
        )
    if end is None or end in config.eos_token_ids:
        return config
    return dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, end))
