"""A checked loader of ``tokenizer.json``: the ``tokenizers`` library aborts the process on some files."""

from __future__ import annotations

import codecs
import json
from typing import Any

import tokenizers
from tokenizers import Tokenizer

from fusion_edge.runtime.bundle.json_file import object_of_pairs
from fusion_edge.runtime.bundle.manifest import TOKENIZER
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.tokenization.schema import check_text, check_tokenizer


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """Load the bundle's tokenizer. Raise :class:`FusionError` for an unsupported file."""
    path = bundle.path(TOKENIZER)
    try:
        content = path.read_bytes()
        check_tokenizer(parse_tokenizer(content), bundle.manifest.model.language.vocab_size)
        return _build(content.removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError) as error:
        raise FusionError(
            f"{path} cannot be loaded as a tokenizer ({error}); export the bundle again, or upgrade tokenizers."
        ) from error


def parse_tokenizer(content: bytes) -> dict[str, Any]:
    """Parse the JSON object in ``content``.

    Raises ``ValueError`` for other content, an object that is too large, or a duplicate key, of which the library might
    read the value that is not checked.
    """
    text = content.decode("utf-8-sig")
    check_text(text)
    try:
        data = json.loads(text, object_pairs_hook=object_of_pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


def build_tokenizer(data: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer that ``data`` describes. Raise ``ValueError`` for unsupported data."""
    check_tokenizer(data)
    return _build(json.dumps(data).encode())


def _build(content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception, and its panics derive from BaseException
        raise ValueError(f"tokenizers {tokenizers.__version__}: {error}") from None
