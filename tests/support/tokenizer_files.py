"""Tokenizer files for tests: the golden ones, and SentencePiece models built field by field."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.paths import GOLDEN
from tokenizers import Tokenizer

from fusion_edge.export.checkpoint.tokenizer import tokenizer_json

PHI = GOLDEN / "FUSION-tiny-Phi"
LLAMA = GOLDEN / "FUSION-X-tiny-LLaMA"


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(folder))


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
Piece = tuple[str, float, int]
RESERVED: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
RESERVED += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
LETTERS: list[Piece] = [(letter, -1e6 - index, NORMAL) for index, letter in enumerate("▁abc")]
BPE_TRAINER = {3: 2, 35: 1}
IDENTITY = {1: b"identity", 3: 0, 4: 0, 5: 1}
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec { add_dummy_prefix: false }


def varint(value: int) -> bytes:
    head = bytearray()
    while value > 0x7F:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*head, value])


def message(fields: dict[int, Any]) -> bytes:
    encoded = b""
    for number, value in fields.items():
        if isinstance(value, float):
            encoded += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            encoded += varint(number << 3) + varint(value)
        else:
            encoded += varint(number << 3 | 2) + varint(len(value)) + value
    return encoded


def sentencepiece_model(
    pieces: Sequence[Piece], trainer: dict[int, Any] = BPE_TRAINER, normalizer: dict[int, Any] = IDENTITY
) -> bytes:
    body = b"".join(message({1: message({1: text.encode(), 2: score, 3: kind})}) for text, score, kind in pieces)
    return body + message({2: message(trainer), 3: message(normalizer)})


def added(*contents: str, start: int, **flags: bool) -> dict[str, dict[str, Any]]:
    return {str(start + index): {"content": content, **flags} for index, content in enumerate(contents)}


def write_phi(folder: Path, model: bytes, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "added_tokens_decoder": added("<vision_start>", "<vision_end>", start=90_000, special=True),
    }
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return folder
