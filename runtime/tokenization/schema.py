"""An allowlist for ``tokenizer.json``: byte-level and SentencePiece BPE, their components and fields.

For some other files the ``tokenizers`` library aborts the process or needs gigabytes of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from fusion_edge.runtime.tokenization.regex_cost import check_regex

MAX_TOKENS = 1 << 20
_MAX_CHARACTERS = 32 << 20  # of the file; the largest known one, Llama's, has 17 million
_MAX_VALUES = {"{": 100_000, "[": 2_000_000, ",": 4_000_000}  # per file, which bounds its memory
_MAX_COMPONENTS = 8  # of a sequence
_MAX_TOKEN_CHARACTERS = 1000

Check = Callable[[Any], bool]


def check_text(text: str) -> None:
    """Raise ``ValueError`` for a text that needs too much memory to parse."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, more than {_MAX_CHARACTERS}")
    for character, most in _MAX_VALUES.items():
        if text.count(character) > most:
            raise ValueError(f"it has more than {most} of {character!r}")


def check_tokenizer(data: Mapping[str, Any], vocab_size: int = MAX_TOKENS) -> None:
    """Raise ``ValueError``, a part of a sentence, unless the library can build and run the tokenizer ``data``.

    Every id must be below ``vocab_size``.
    """
    _fields("the tokenizer", data, _TOKENIZER)
    for field in ("model", "decoder"):
        if data.get(field) is None:
            raise ValueError(f"the tokenizer lacks its {field}")
    _check_model(data["model"], vocab_size)
    _check_added_tokens(data.get("added_tokens") or [], vocab_size)
    for name, types in (("normalizer", _NORMALIZERS), ("pre_tokenizer", _PRE_TOKENIZERS), ("decoder", _DECODERS)):
        _check_component(name, data.get(name), types)
    known = data["model"]["vocab"].keys() | {token["content"] for token in data.get("added_tokens") or []}
    _check_component("post_processor", data.get("post_processor"), _POST_PROCESSORS)
    _check_templates(data.get("post_processor"), known, vocab_size)


def _fields(name: str, value: Any, checks: Mapping[str, Check]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)}, not an object")
    for field, content in value.items():
        if field not in checks:
            raise ValueError(f"{name} has the field {_short(field)}, which is not supported")
        if not checks[field](content):
            raise ValueError(f"{name} has {field} = {_short(content)}, which is not supported")


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:60]


def _one_of(*values: object) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_character(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _is_small(value: Any) -> bool:
    return type(value) is int and 0 <= value < 256


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TOKEN_CHARACTERS


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    [(kind, text)] = value.items()
    if kind == "Regex" and isinstance(text, str):
        check_regex(text)
        return True
    return kind == "String" and _is_token(text)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_component(value: Any) -> bool:
    return value is None or isinstance(value, dict)


_TOKENIZER: dict[str, Check] = {
    "version": _one_of("1.0"),
    "truncation": _one_of(None),
    "padding": _one_of(None),
    "added_tokens": lambda value: value is None or isinstance(value, list),
    "normalizer": _is_component,
    "pre_tokenizer": _is_component,
    "post_processor": _is_component,
    "decoder": _is_component,
    "model": _is_object,
}
_MODEL: dict[str, Check] = {
    "type": _one_of("BPE"),
    "dropout": _one_of(None),
    "unk_token": lambda value: value is None or _is_token(value),
    "continuing_subword_prefix": _one_of(None, ""),
    "end_of_word_suffix": _one_of(None, ""),
    "fuse_unk": _is_bool,
    "byte_fallback": _is_bool,
    "ignore_merges": _is_bool,
    "vocab": _is_object,
    "merges": _is_list,
}
_FLAGS: dict[str, Check] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), _is_bool)
_ADDED_TOKEN: dict[str, Check] = {"id": _is_id, "content": _is_token, **_FLAGS}
_BYTE_LEVEL: dict[str, Check] = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), _is_bool)
_REPLACE: dict[str, Check] = {"pattern": _is_pattern, "content": lambda value: value == "" or _is_character(value)}
_METASPACE: dict[str, Check] = {
    "replacement": _is_character,
    "str_rep": _is_character,
    "prepend_scheme": _one_of("first", "never", "always"),
    "add_prefix_space": _is_bool,
    "split": _is_bool,
}
_NORMALIZERS: dict[str, dict[str, Check]] = {
    "Sequence": {"normalizers": _is_list},
    "Replace": _REPLACE,
    "Prepend": {"prepend": _is_character},
    "NFC": {},
    "NFD": {},
    "NFKC": {},
    "NFKD": {},
}
_PRE_TOKENIZERS: dict[str, dict[str, Check]] = {
    "Sequence": {"pretokenizers": _is_list},
    "Split": {
        "pattern": _is_pattern,
        "behavior": _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"),
        "invert": _is_bool,
    },
    "ByteLevel": _BYTE_LEVEL,
    "Metaspace": _METASPACE,
    "Digits": {"individual_digits": _is_bool},
}
_DECODERS: dict[str, dict[str, Check]] = {
    "Sequence": {"decoders": _is_list},
    "ByteLevel": _BYTE_LEVEL,
    "Metaspace": _METASPACE,
    "Replace": _REPLACE,
    "ByteFallback": {},
    "Fuse": {},
    "Strip": {"content": _is_character, "start": _is_small, "stop": _one_of(0)},
}
_POST_PROCESSORS: dict[str, dict[str, Check]] = {
    "Sequence": {"processors": _is_list},
    "ByteLevel": _BYTE_LEVEL,
    "TemplateProcessing": {"single": _is_list, "pair": _is_list, "special_tokens": _is_object},
}
_TEMPLATE_TOKEN: dict[str, Check] = {"id": _is_token, "ids": _is_list, "tokens": _is_list}
_TEMPLATE_PIECES: dict[str, dict[str, Check]] = {
    "SpecialToken": {"id": _is_token, "type_id": _is_small},
    "Sequence": {"id": _one_of("A", "B"), "type_id": _is_small},
}


def _check_component(name: str, value: Any, types: Mapping[str, Mapping[str, Check]], inner: bool = False) -> None:
    if value is None and not inner:
        return
    if not isinstance(value, dict):
        value = {}
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in types or (inner and kind == "Sequence"):
        raise ValueError(f"{name} is of the type {_short(kind)}, which is not supported")
    _fields(f"{name} {kind}", value, {"type": lambda _: True, **types[kind]})
    if kind == "Sequence":
        [field] = types[kind]
        parts = (value or {}).get(field, [])
        if len(parts) > _MAX_COMPONENTS:
            raise ValueError(f"{name} has {len(parts)} parts, more than {_MAX_COMPONENTS}")
        for part in parts:
            _check_component(name, part, types, inner=True)


def _check_model(model: Mapping[str, Any], vocab_size: int) -> None:
    _fields("model", model, _MODEL)
    if {"vocab", "merges"} - model.keys():
        raise ValueError("model lacks its vocab or its merges")
    vocab = model["vocab"]
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < vocab_size:
            raise ValueError(f"the token {token[:40]!r} has the id {_short(index)}, expected 0 to {vocab_size - 1}")
    if len(set(vocab.values())) != len(vocab):
        raise ValueError("two tokens of vocab have the same id")
    if max(map(len, vocab), default=0) > _MAX_TOKEN_CHARACTERS:
        raise ValueError(f"vocab has a token of more than {_MAX_TOKEN_CHARACTERS} characters")
    if _longest_union(model["merges"]) > _longest(vocab):
        raise ValueError("merges has a pair whose union is longer than every token of vocab")


def _longest_union(merges: list[Any]) -> int:
    """Return the UTF-8 bytes of the longest merged token. The library aborts if no token is that long.

    The library itself checks that each merge is a pair of tokens and gives a token.
    """
    kinds = set(map(type, merges))
    if kinds <= {str}:  # such as "a b"
        return _longest(merges) - 1
    if kinds == {list} and set(map(len, merges)) == {2} and set(map(type, chain.from_iterable(merges))) == {str}:
        return _longest(map("".join, merges))
    raise ValueError("merges is not a list of pairs of tokens")


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, map(str.encode, texts)), default=0)


def _check_added_tokens(added: list[Any], vocab_size: int) -> None:
    for token in added:
        _fields("added_tokens", token, _ADDED_TOKEN)
        if _ADDED_TOKEN.keys() - token.keys():
            raise ValueError(f"an entry of added_tokens lacks {min(_ADDED_TOKEN.keys() - token.keys())}")
        if token["id"] >= vocab_size:
            raise ValueError(f"{token['content']!r} has the id {token['id']}, expected 0 to {vocab_size - 1}")
    for field in ("id", "content"):
        if len({token[field] for token in added}) != len(added):
            raise ValueError(f"two added_tokens have the same {field}")


def _check_templates(post_processor: Any, known: set[str], vocab_size: int) -> None:
    """Raise ``ValueError`` unless every special token in a template has ids."""
    for part in (post_processor or {}).get("processors", [post_processor]):
        if not part or part["type"] != "TemplateProcessing":
            continue
        special = part.get("special_tokens", {})
        for name, token in special.items():
            _fields("special_tokens", token, _TEMPLATE_TOKEN)
            ids, tokens = token.get("ids", []), token.get("tokens", [])
            if token.get("id") != name or len(ids) != len(tokens) or not 0 < len(ids) <= _MAX_COMPONENTS:
                raise ValueError(f"the template's special token {name[:40]!r} does not have one id per token")
            if not all(_is_id(index) and index < vocab_size for index in ids) or not set(map(str, tokens)) <= known:
                raise ValueError(f"the template's special token {name[:40]!r} is not in the vocabulary")
        for pieces in (part.get("single", []), part.get("pair", [])):
            if len(pieces) > _MAX_COMPONENTS:
                raise ValueError(f"a template has {len(pieces)} pieces, more than {_MAX_COMPONENTS}")
            for piece in pieces:
                _fields("a template", piece, dict.fromkeys(_TEMPLATE_PIECES, _is_object))
                for kind, content in piece.items():
                    _fields(f"a template's {kind}", content, _TEMPLATE_PIECES[kind])
                    if kind == "SpecialToken" and content.get("id") not in special:
                        raise ValueError(f"a template names {_short(content.get('id'))}, which special_tokens lacks")
