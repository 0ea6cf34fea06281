"""What the configuration files of a tokenizer say, as each version of the ``transformers`` library writes them.

Added tokens with their ids and flags are, by version, the ``added_tokens_decoder`` of ``tokenizer_config.json``
(4.34 and later), ``added_tokens`` of ``tokenizer.json`` (5 and later) or ``added_tokens.json`` (before).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.tokenization.schema import MAX_TOKENS

_NAMED_TOKENS = {  # the slots of LlamaTokenizer and their defaults
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": None,
    "pad_token": None,
    "cls_token": None,
    "mask_token": None,
}
_GROUPS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_MAX_CHARACTERS = 1000  # of a token


class TokenizerConfig:
    """``tokenizer_config.json`` with checked access, and the files beside it that older versions wrote."""

    def __init__(self, folder: Path, json: Mapping[str, Any] | None) -> None:
        """``json`` is the content of ``tokenizer.json`` where there is one."""
        self.file = folder / "tokenizer_config.json"
        self._data = read_json_object(self.file)
        self._json = json
        self._folder = folder
        if self._data.get("added_tokens_decoder") is None and os.path.lexists(folder / "special_tokens_map.json"):
            self._data |= read_json_object(folder / "special_tokens_map.json")  # read by versions before 4.34 alone

    @property
    def class_name(self) -> str:
        return str(self._data.get("tokenizer_class")).removesuffix("Fast")

    @property
    def is_version_5(self) -> bool:
        """Whether transformers 5 or later wrote it."""
        return "backend" in self._data

    def flag(self, name: str, default: bool) -> bool:
        """A setting; null is the default."""
        value = self._data.get(name)
        if value is not None and not isinstance(value, bool):
            raise FusionError(f"{self.file}: {name} is {repr(value)[:60]}; expected true or false.")
        return default if value is None else value

    @property
    def bos(self) -> str | None:
        return self._content("bos_token", self._data.get("bos_token", _NAMED_TOKENS["bos_token"]))

    def named_tokens(self) -> set[str]:
        """What ``transformers`` calls all special tokens; a token's own ``special`` flag does not count."""
        tokens = [self._content(slot, self._data.get(slot, default)) for slot, default in _NAMED_TOKENS.items()]
        for group in _GROUPS:
            values = self._data.get(group) or []
            if not isinstance(values, list | dict):
                raise self._wrong(group, values, "a list of tokens")
            listed = values.values() if isinstance(values, dict) else values
            tokens += [self._content(group, token) for token in listed]
        return {token for token in tokens if token is not None}

    def added_tokens(self) -> dict[int, AddedToken]:
        """By id. Raises :class:`FusionError` where no file has them, and for wrong types and ids."""
        entries = self._data.get("added_tokens_decoder")
        if entries is not None:
            if not isinstance(entries, dict):
                raise self._no_decoder()
            return self._tokens(self.file, list(entries.items()))
        if self._json is not None:
            listed = self._json.get("added_tokens") or []
            return self._tokens(self._folder / "tokenizer.json", [(token["id"], token) for token in listed])
        older = self._folder / "added_tokens.json"
        if not older.exists():
            raise self._no_decoder()
        # Flags are known of the tokens that special_tokens_map.json has as objects, and of no other.
        named = self.named_tokens()
        objects = [value for value in self._data.values() if isinstance(value, dict)]
        flags = {token["content"]: token for token in objects if isinstance(token.get("content"), str)}
        entries = []
        for content, index in read_json_object(older).items():
            special = content in named
            token = {"normalized": not special, **flags.get(content, {}), "content": content, "special": special}
            entries.append((index, token))
        return self._tokens(older, entries)

    def _tokens(self, file: Path, entries: list[tuple[Any, Any]]) -> dict[int, AddedToken]:
        tokens: dict[int, AddedToken] = {}
        for key, entry in entries:
            index = _index(key)
            content = entry.get("content") if isinstance(entry, dict) else None
            if index is None or not isinstance(content, str) or not 0 < len(content) <= _MAX_CHARACTERS:
                raise self._no_decoder()
            flags = {flag: entry.get(flag) for flag in _FLAGS}
            if not all(value is None or isinstance(value, bool) for value in flags.values()):
                raise FusionError(f"{file}: a flag of the token {content[:60]!r} is not true or false.")
            if not index < MAX_TOKENS:
                raise FusionError(f"{file} gives {content[:60]!r} the id {index}; expected an id below {MAX_TOKENS}.")
            if index in tokens:
                raise FusionError(f"{file} gives the id {index} twice, also to {content[:60]!r}; expected it once.")
            try:
                tokens[index] = AddedToken(content, **{flag: bool(value) for flag, value in flags.items()})
            except UnicodeEncodeError:
                raise self._no_decoder() from None
        return tokens

    def _content(self, name: str, token: Any) -> str | None:
        """A special token is written as a string, as an object or as null."""
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) and token is not None:
            raise self._wrong(name, token, "a token: a string, an object with its content, or null")
        return content

    def _wrong(self, name: str, value: Any, expected: str) -> FusionError:
        return FusionError(f"{self.file}: {name} is {repr(value)[:60]}; expected {expected}.")

    def _no_decoder(self) -> FusionError:
        return FusionError(
            f"{self.file} has no valid added_tokens_decoder, expected the tokens by id: save the tokenizer "
            "again with `transformers` 4.34 or later."
        )


def _index(key: Any) -> int | None:
    try:
        return int(key) if type(key) in (int, str) else None
    except ValueError:
        return None
