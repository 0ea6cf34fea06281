"""Tokenizer of the demo model: a small SentencePiece model trained on the demo's words.

Files and rules are those of the released Phi checkpoints: byte fallback, added tokens that remove the white space after
them, and a leading space before a text that does not start with one.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import sentencepiece

from fusion_edge.benchmarks.demo import pictures
from fusion_edge.benchmarks.json_file import write_json
from fusion_edge.runtime.bundle.templates import TEMPLATES

PIECES = 1016  # with the eight added tokens: 1024
ADDED = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
    "<vision_start>",
    "<vision_end>",
)
"""Added tokens in the order of their ids, after the SentencePiece pieces."""
KEEP_SPACE_AFTER = ("<vision_start>", "<vision_end>")
MAX_LENGTH = 512


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer and write its files as in a released checkpoint."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    ids = {token: PIECES + i for i, token in enumerate(ADDED)}
    write_json(folder / "added_tokens.json", ids)
    described = {i: _describe(token) for i, token in enumerate(("<unk>", "<s>", "</s>"))}
    described |= {i: _describe(token) for token, i in ids.items()}
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<unk>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": True,
        "added_tokens_decoder": {str(i): token | {"special": True} for i, token in described.items()},
        "additional_special_tokens": ADDED,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": MAX_LENGTH,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", config | special)
    named = {name: _describe(token) for name, token in special.items()}
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": ADDED} | named)


def _corpus() -> list[str]:
    """Return every sentence of the demo, and words after a bracket.

    Answers and first words of questions follow an added token or a line break, without a space. The bracket makes them
    single pieces there, too.
    """
    rng = np.random.default_rng(0)
    sentences = {TEMPLATES["phi_3"].system.split(">")[1].split("<")[0].strip(), *pictures.GENERIC_GUIDES}
    for _ in range(2000):
        scene = pictures.arrange(rng)
        asked = [*pictures.ask(scene, rng, 4, pictures.KINDS | pictures.LESSONS), *pictures.conversation(scene, rng, 3)]
        sentences |= {text for question in asked for text in (question.text, question.answer)}
    words = sorted({word for sentence in sentences for word in re.findall(r"\w+", sentence)})
    attached = [f"({word}" for word in words for _ in range(2000)]
    return [*sorted(sentences), *(f" {word}" for word in words for _ in range(500)), *attached]


def _describe(token: str) -> dict[str, object]:
    strips = token in ADDED and token not in KEEP_SPACE_AFTER
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": strips, "single_word": False}
