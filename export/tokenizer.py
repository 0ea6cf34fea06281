"""One ``tokenizer.json`` for both kinds of FUSION checkpoint, with exactly the released tokenizers' ids.

Llama checkpoints bring a ``tokenizer.json``. Phi's tokenizer is a SentencePiece BPE model behind the slow
``LlamaTokenizer`` class of the ``transformers`` library with ``legacy=false``, which is rebuilt here:

1. Every U+2581 of the text becomes a space, and one U+2581 is put in front of the text.
2. Added tokens are cut out of the text (leftmost, longest); whitespace beside them goes as their flags say.
3. If the text began with one of the *named* special tokens (bos, eos, unk, additional, ...), the lone U+2581
   before it is dropped; before any other added token it stays.
4. Each remaining stretch is one SentencePiece BPE input without further normalization; characters outside
   of the vocabulary become bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fusion_edge.export.source import read_json_object
from fusion_edge.runtime.errors import FusionError

REQUIRED_TOKENS = ("<vision_start>", "<vision_end>")

_SPACE = "\u2581"  # SentencePiece's visible space
_NAMED_TOKENS = {  # the slots of LlamaTokenizer and their defaults
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": None,
    "pad_token": None,
    "cls_token": None,
    "mask_token": None,
}
# Enumerations of the SentencePiece model format.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_UNIGRAM, _BPE = 1, 2


def tokenizer_json(folder: Path) -> str:
    """The content of a ``tokenizer.json`` (format of the ``tokenizers`` library) for a checkpoint folder.

    Its ``encode(text).ids`` are the released tokenizer's ids, BOS included where that adds one. The slow
    ``LlamaTokenizer`` is rebuilt from ``tokenizer.model`` even if a ``tokenizer.json`` lies beside it: the
    released models were trained with it (FUSION.md, "The four released models").

    Raises:
        FusionError: Tokenizer files missing or damaged, a kind or setting of tokenizer that is not supported,
            or a checkpoint without ``<vision_start>`` and ``<vision_end>``.
    """
    config_file = folder / "tokenizer_config.json"
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model_file.exists() and not json_file.exists():
        raise FusionError(
            f"{folder} has no tokenizer, expected tokenizer.json (Llama) or tokenizer.model (Phi): "
            "pass the complete checkpoint folder."
        )
    config = read_json_object(config_file)
    if model_file.exists() and _class_name(config) == "LlamaTokenizer":
        tokenizer = _from_sentencepiece(model_file, config_file, config)
    elif json_file.exists():
        tokenizer = _from_json(json_file, config_file, config)
    else:
        raise FusionError(
            f"{config_file} asks for {_class_name(config)}, which cannot be built from tokenizer.model, "
            "expected LlamaTokenizer: add the tokenizer.json that the `transformers` library saves."
        )
    for token in REQUIRED_TOKENS:
        if tokenizer.encode(token, add_special_tokens=False).tokens != [token]:
            raise FusionError(
                f"The tokenizer in {folder} has no added token {token}, which every FUSION checkpoint has: "
                "pass a FUSION checkpoint, not the language model that it was made from."
            )
    content: str = tokenizer.to_str()
    return content


def _class_name(config: dict[str, Any]) -> str:
    return str(config.get("tokenizer_class")).removesuffix("Fast")


# --- tokenizer.json -------------------------------------------------------------------------------


def _from_json(json_file: Path, config_file: Path, config: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json_file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise FusionError(
            f"{json_file} is no tokenizer that the `tokenizers` library can load ({error}): download it "
            "again, or update that library."
        ) from error
    # A training run may save its truncation and padding; the released code switches them off.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for index, token in sorted(_added_tokens(config_file, config).items()):
        _add(tokenizer, token, token.special)  # does nothing for one that tokenizer.json already has
        if tokenizer.token_to_id(token.content) != index:
            raise FusionError(
                f"{config_file} gives {token.content} the id {index}, {json_file.name} gives it "
                f"{tokenizer.token_to_id(token.content)}: take both files from the same checkpoint."
            )
    return tokenizer


def _add(tokenizer: Tokenizer, token: AddedToken, special: bool) -> None:
    """``special`` tokens are left out when ids are decoded with ``skip_special_tokens``."""
    if special:
        tokenizer.add_special_tokens([token])
    else:
        tokenizer.add_tokens([token])


def _added_tokens(config_file: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """``added_tokens_decoder``: id -> token."""
    entries = config.get("added_tokens_decoder")
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        tokens = {
            int(index): AddedToken(str(entry["content"]), **{flag: bool(entry.get(flag)) for flag in flags})
            for index, entry in entries.items()  # type: ignore[union-attr]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FusionError(
            f"{config_file} has no valid added_tokens_decoder, expected the tokens by id: save the tokenizer "
            "again with `transformers` 4.34 or later."
        ) from error
    return tokens


# --- SentencePiece --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    type: int


def _from_sentencepiece(model_file: Path, config_file: Path, config: dict[str, Any]) -> Tokenizer:
    _require_supported(config_file, config)
    pieces = _read_pieces(model_file)
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    added = _added_tokens(config_file, config)
    named = _named_tokens(config)
    for index, token in added.items():
        in_place = index >= len(pieces) or (index >= 0 and pieces[index].text == token.content)
        if not in_place or vocabulary.setdefault(token.content, index) != index:
            raise FusionError(
                f"{config_file} gives {token.content} the id {index}, which {model_file.name} contradicts: "
                "take both files from the same checkpoint."
            )
        if token.single_word:
            raise FusionError(
                f"{config_file} has {token.content} with single_word=true, supported is false as in the "
                "released checkpoints: set it so if the model was trained with it."
            )
    contents = {token.content for token in added.values()}
    for name in sorted(named - contents):
        if name not in vocabulary:
            raise FusionError(f"{config_file} names the special token {name}, which has no id: add it there.")
        added[vocabulary[name]] = AddedToken(name, normalized=False, special=True)

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(pieces), byte_fallback=True))
    # Set before tokens are added, because it decides how they are found.
    tokenizer.normalizer = _normalizer(added.values(), named, bool(config.get("add_prefix_space", True)))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False)
    for _, token in sorted(added.items()):
        # normalized=True: cut out after the normalizer has seen the text as a whole (steps 1 to 3).
        whole = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=True)
        _add(tokenizer, whole, token.special or token.content in named)
    bos = _content(config.get("bos_token", _NAMED_TOKENS["bos_token"]))
    if bos is not None and config.get("add_bos_token", True):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _require_supported(config_file: Path, config: dict[str, Any]) -> None:
    # An absent or null "legacy" means true.
    refused = {"legacy": config.get("legacy") is not False, "add_eos_token": config.get("add_eos_token")}
    for setting, is_set in refused.items():
        if is_set:
            raise FusionError(
                f"{config_file} does not have {setting}=false, the only value supported and that of the "
                "released checkpoints: set it so if the model was trained with it."
            )


def _content(token: Any) -> str | None:
    """A special token is written as a string, as an object or as null."""
    return token.get("content") if isinstance(token, dict) else token


def _named_tokens(config: dict[str, Any]) -> set[str]:
    """What ``transformers`` calls all special tokens; a token's own ``special`` flag does not count."""
    tokens = [_content(config.get(slot, default)) for slot, default in _NAMED_TOKENS.items()]
    for group in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(group) or []
        tokens += [_content(token) for token in (values.values() if isinstance(values, dict) else values)]
    return {token for token in tokens if token is not None}


def _normalizer(added: Iterable[AddedToken], named: set[str], prefix: bool) -> normalizers.Normalizer:
    """Steps 1 and 3: visible spaces to spaces, then one visible space before the text.

    The library applies the same normalizer to the added tokens' own text to find them afterwards, so a text
    that is exactly one unnamed added token gets no space either (the slow tokenizer keeps one there).
    """
    spaces = normalizers.Replace(_SPACE, " ")
    if not prefix:
        return spaces
    exceptions = [r"\z"]
    for token in added:
        # With lstrip, the spaces between the start and the token belong to the token.
        before = r"\s*" if token.lstrip else ""
        after = "" if token.content in named else r"\z"
        exceptions.append(before + re.escape(token.content) + after)
    start = Regex(rf"\A(?!{'|'.join(exceptions)})")
    return normalizers.Sequence([spaces, normalizers.Replace(start, _SPACE)])


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Merge rules in order of rank.

    SentencePiece joins the two neighbours whose union has the best score, wherever the union was cut; so
    every cut of a piece into two pieces is a rule, ranked by the piece's score. Equal scores (the cuts of one
    piece, and runs of spaces, which all have the same) are joined from the left: what has already grown at
    the left grows on, so the longest left part goes first.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.type == _NORMAL}
    rules = [
        (-score, -cut, -len(text), text)
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(text[:-cut], text[-cut:]) for _, cut, _, text in sorted(rules)]


# --- The SentencePiece model file (protocol buffers; field numbers from sentencepiece_model.proto)


def _read_pieces(model_file: Path) -> list[_Piece]:
    """The vocabulary, by id, of a model that :func:`_from_sentencepiece` can reproduce."""
    damaged = f"{model_file} is truncated or no SentencePiece model: download it again."
    try:
        fields = list(_fields(model_file.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == 1]
        # A message that comes in parts is the message of the parts put together.
        trainer, normalizer = (
            dict(_fields(b"".join(value for number, value in fields if number == part))) for part in (2, 3)
        )
    # A field of another kind than expected shows as one of the last three.
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise FusionError(damaged) from error
    if not pieces or not trainer or not normalizer:
        raise FusionError(damaged)

    def refuse(what: str) -> FusionError:
        return FusionError(
            f"{model_file} {what}, which is not supported: use the tokenizer.model of a released FUSION-Phi "
            "checkpoint (byte-level fallback BPE without normalization)."
        )

    model_type = trainer.get(3, _UNIGRAM)
    if model_type != _BPE:
        raise refuse("is a unigram model" if model_type == _UNIGRAM else f"has the model type {model_type}")
    if not trainer.get(35, False):
        raise refuse("has no byte fallback")
    if trainer.get(24, False) or not normalizer.get(5, True) or normalizer.get(4, True) or normalizer.get(2):
        raise refuse("normalizes its text or treats spaces in another way")
    kinds = [piece.type for piece in pieces]
    if not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE} or kinds.count(_UNKNOWN) != 1:
        raise refuse("has user-defined or unused pieces, or not exactly one unknown piece")
    normal = [piece for piece in pieces if piece.type == _NORMAL]
    scores = [piece.score for piece in normal if piece.text.strip(_SPACE)]
    scores += {piece.score for piece in normal if not piece.text.strip(_SPACE)}  # see _merges
    if len(set(scores)) != len(scores) or len({piece.text for piece in pieces}) != len(pieces):
        raise refuse("has pieces of equal score or equal text")
    if {f"<0x{byte:02X}>" for byte in range(256)} != {piece.text for piece in pieces if piece.type == _BYTE}:
        raise refuse("lacks byte pieces")
    return pieces


def _piece(message: bytes) -> _Piece:
    fields = dict(_fields(message))
    [score] = struct.unpack("<f", fields.get(2, bytes(4)))
    return _Piece(fields[1].decode("utf-8"), score, fields.get(3, _NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one message: ``int`` for varints, ``bytes`` for the others.

    Raises ``ValueError`` if the message is cut short or has a wire type that the format does not use.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position == len(message) or shift > 63:
                raise ValueError("no varint")
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type}")
        length = {1: 8, 5: 4}.get(wire_type) or varint()
        if position + length > len(message):
            raise ValueError("cut short")
        yield number, message[position : position + length]
        position += length
