"""Read a tokenizer's configuration files, as every version of ``transformers`` writes them.

Added tokens are in ``added_tokens_decoder`` of ``tokenizer_config.json`` (since 4.34), ``added_tokens`` of
``tokenizer.json`` (since 5), or ``added_tokens.json`` (before).
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

_NAMED_TOKENS = {  # special tokens of LlamaTokenizer, with defaults
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
_MAX_CHARACTERS = 1000  # per token


class TokenizerConfig:
    """Fields of ``tokenizer_config.json`` and of the other files that older versions write."""

    def __init__(self, folder: Path, json: Mapping[str, Any] | None) -> None:
        """Read the files in ``folder``. ``json`` is the content of ``tokenizer.json``, if there is one."""
        self.file = folder / "tokenizer_config.json"
        self._data = read_json_object(self.file)
        self._json = json
        self._folder = folder
        if self._data.get("added_tokens_decoder") is None and os.path.lexists(folder / "special_tokens_map.json"):
            self._data |= read_json_object(folder / "special_tokens_map.json")  # only versions before 4.34 read it

    @property
    def class_name(self) -> str:
        """Tokenizer class in ``transformers``, without ``Fast``."""
        return str(self._data.get("tokenizer_class")).removesuffix("Fast")

    @property
    def is_version_5(self) -> bool:
        """Whether ``transformers`` 5 or later wrote the files."""
        return "backend" in self._data

    def flag(self, name: str, default: bool) -> bool:
        """Return a Boolean setting, or ``default`` if it is missing or null."""
        value = self._data.get(name)
        if value is not None and not isinstance(value, bool):
            raise FusionError(f"{self.file}: {name} is {repr(value)[:60]}; expected true or false.")
        return default if value is None else value

    @property
    def bos(self) -> str | None:
        """Start token."""
        return self._content("bos_token", self._data.get("bos_token", _NAMED_TOKENS["bos_token"]))

    def named_tokens(self) -> set[str]:
        """Return ``all_special_tokens`` of ``transformers``, which does not depend on a token's ``special`` flag."""
        tokens = [self._content(slot, self._data.get(slot, default)) for slot, default in _NAMED_TOKENS.items()]
        for group in _GROUPS:
            values = self._data.get(group) or []
            if not isinstance(values, list | dict):
                raise self._wrong(group, values, "a list of tokens")
            listed = values.values() if isinstance(values, dict) else values
            tokens += [self._content(group, token) for token in listed]
        return {token for token in tokens if token is not None}

    def added_tokens(self) -> dict[int, AddedToken]:
        """Return the added tokens by id. Raises :class:`FusionError` if no file has them, or for an invalid entry."""
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
        # Only tokens that are objects in special_tokens_map.json have flags.
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
                raise FusionError(f"{file}: a flag of the token {content[:60]!r} is invalid; expected true or false.")
            if not index < MAX_TOKENS:
                raise FusionError(f"{file}: the id of {content[:60]!r} is {index}; expected an id below {MAX_TOKENS}.")
            if index in tokens:
                raise FusionError(
                    f"{file}: the id {index} is given twice, also to {content[:60]!r}; expected unique ids."
                )
            try:
                tokens[index] = AddedToken(content, **{flag: bool(value) for flag, value in flags.items()})
            except UnicodeEncodeError:
                raise self._no_decoder() from None
        return tokens

    def _content(self, name: str, token: Any) -> str | None:
        """Return the content of a special token, which may be a string, an object or null."""
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) and token is not None:
            raise self._wrong(name, token, "a string, an object with its content, or null")
        return content

    def _wrong(self, name: str, value: Any, expected: str) -> FusionError:
        return FusionError(f"{self.file}: {name} is {repr(value)[:60]}; expected {expected}.")

    def _no_decoder(self) -> FusionError:
        return FusionError(
            f"{self.file} has no valid added_tokens_decoder; expected an object of tokens by id. Save the tokenizer "
            "again with `transformers` 4.34 or later."
        )


def _index(key: Any) -> int | None:
    try:
        return int(key) if type(key) in (int, str) else None
    except ValueError:
        return None
