"""Read SentencePiece models: protocol buffers with the field numbers of ``sentencepiece_model.proto``."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_edge.export.checkpoint.input_files import identify_format, read_file
from fusion_edge.runtime.bundle.protobuf import fields as fields_of
from fusion_edge.runtime.errors import FusionError

SPACE = "\u2581"  # SentencePiece's visible space

# Piece types and model types.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_UNIGRAM, _BPE = 1, 2
_MAX_FILE_BYTES = 8 << 20  # Llama's and Phi's have 0.5 MB
_MAX_PIECES = 1 << 16
_MAX_OTHERS = 100  # fields other than pieces
_MAX_PIECE_CHARACTERS = 128
_MAX_SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary."""

    text: str
    score: float
    type: int


def merge_rules(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Return the BPE merge rules of a SentencePiece vocabulary, in order of rank.

    SentencePiece merges the two neighbors whose union has the best score, however the union is split. So every split of
    a piece into two pieces is a rule, ranked by the piece's score. Equal scores (splits of one piece, and runs of
    spaces, which share a score) merge from the left: the longest left part comes first.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.type == _NORMAL}
    rules = [
        (-score, -cut, -len(text), text)
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(text[:-cut], text[-cut:]) for _, cut, _, text in sorted(rules)]


def read_pieces(model_file: Path) -> list[Piece]:
    """Return the vocabulary in order of ids. Raises :class:`FusionError` for a model that is not supported."""
    damaged = f"{model_file} is truncated or not a SentencePiece model: download it again."
    content = read_file(model_file, _MAX_FILE_BYTES)
    try:
        pieces, trainer, normalizer = _parse(content)
    # A field of an unexpected type raises one of the last three.
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        what = identify_format(content[:64])
        raise FusionError(f"{model_file} is {what}." if what else damaged) from error
    if not pieces or not trainer or not normalizer:
        raise FusionError(damaged)

    def refuse(what: str) -> FusionError:
        return FusionError(
            f"{model_file} {what}, which is not supported; expected BPE with byte fallback, without normalization. Use "
            "the tokenizer.model of a released FUSION-Phi checkpoint."
        )

    model_type = trainer.get(3, _UNIGRAM)
    if model_type != _BPE:
        raise refuse("is a unigram model" if model_type == _UNIGRAM else f"has the model type {model_type}")
    if not trainer.get(35, False):
        raise refuse("has no byte fallback")
    if trainer.get(24, False) or not normalizer.get(5, True) or normalizer.get(4, True) or normalizer.get(2):
        raise refuse("normalizes text or handles spaces in another way")
    kinds = [piece.type for piece in pieces]
    if not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE} or kinds.count(_UNKNOWN) != 1:
        raise refuse("has user-defined or unused pieces, or not exactly one unknown piece")
    normal = [piece for piece in pieces if piece.type == _NORMAL]
    scores = [piece.score for piece in normal if piece.text.strip(SPACE)]
    scores += {piece.score for piece in normal if not piece.text.strip(SPACE)}  # see merge_rules
    if len(set(scores)) != len(scores) or len({piece.text for piece in pieces}) != len(pieces):
        raise refuse("has pieces of equal score or equal text")
    if max(len(piece.text) for piece in pieces) > _MAX_PIECE_CHARACTERS:
        raise refuse(f"has pieces of more than {_MAX_PIECE_CHARACTERS} characters")
    if {f"<0x{byte:02X}>" for byte in range(256)} != {piece.text for piece in pieces if piece.type == _BYTE}:
        raise refuse("lacks byte pieces")
    return pieces


def _parse(content: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """Return the pieces, and the fields of the trainer and the normalizer by number."""
    pieces: list[Piece] = []
    number: int
    value: Any  # operations below raise for a field of an unexpected type
    others: list[tuple[int, Any]] = []
    for number, value in fields_of(content):
        if number == 1:
            pieces.append(_piece(value))
        else:
            others.append((number, value))
        if len(pieces) > _MAX_PIECES or len(others) > _MAX_OTHERS:
            raise ValueError("too many fields")
    # Parts of a message are concatenated, as protocol buffers require.
    trainer, normalizer = (b"".join(value for number, value in others if number == part) for part in (2, 3))
    if max(len(trainer), len(normalizer)) > _MAX_SETTINGS_BYTES:
        raise ValueError("too many fields")
    return pieces, dict(fields_of(trainer)), dict(fields_of(normalizer))


def _piece(message: bytes) -> Piece:
    fields: dict[int, Any] = dict(fields_of(message))
    if not fields[1]:
        raise ValueError("a piece without text")
    [score] = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, _NORMAL))
