"""A ``tokenizer.json`` as a tokenizer, after it has been checked: the ``tokenizers`` library aborts on some."""

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
    """The bundle's tokenizer. Raises :class:`FusionError` for a file that is no tokenizer that a bundle may hold."""
    path = bundle.path(TOKENIZER)
    try:
        content = path.read_bytes()
        check_tokenizer(parse_tokenizer(content), bundle.manifest.model.language.vocab_size)
        return _build(content.removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError) as error:
        raise FusionError(
            f"{path} is no tokenizer that can be loaded ({error}); export the bundle again, or upgrade tokenizers."
        ) from error


def parse_tokenizer(content: bytes) -> dict[str, Any]:
    """The JSON object in ``content``.

    Raises ``ValueError`` if it holds none, or one far too large, or an object with two values of one name: the library
    might read the one that is not checked.
    """
    text = content.decode("utf-8-sig")
    check_text(text)
    try:
        data = json.loads(text, object_pairs_hook=object_of_pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object")
    return data


def build_tokenizer(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``data`` describes.

    Raises ``ValueError`` with what is wrong: with the structure, or for the ``tokenizers`` library.
    """
    check_tokenizer(data)
    return _build(json.dumps(data).encode())


def _build(content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics derive from BaseException
        raise ValueError(f"tokenizers {tokenizers.__version__}: {error}") from None
