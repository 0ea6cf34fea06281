"""Rebuild the slow ``LlamaTokenizer`` of ``transformers`` with ``legacy=false``, which Phi uses.

It encodes a text in four steps:

1. Replace every U+2581 by a space, and put one U+2581 in front of the text.
2. Split off added tokens (leftmost, longest). Their flags say whether they strip adjacent whitespace.
3. If the text begins with a *named* special token (bos, eos, unk, additional, ...), drop the U+2581 before it. Before
   other added tokens it stays.
4. Encode each remaining part by SentencePiece BPE without normalization. Unknown characters become bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fusion_edge.export.checkpoint.sentencepiece_model import SPACE, merge_rules, read_pieces
from fusion_edge.export.checkpoint.tokenizer_config import TokenizerConfig
from fusion_edge.runtime.errors import FusionError

# The start of Llama's and Phi's vocabulary. Its runs of spaces have the lowest score, independent of their ids.
_LLAMA_PIECES = {SPACE * 2: 259, f"{SPACE}t": 260, "er": 261}


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Return whether ``transformers`` 5 converted this ``tokenizer.json`` from a SentencePiece model."""
    return bool(content["model"].get("byte_fallback")) and content.get("normalizer") is None


def _adds_bos(content: dict[str, Any], bos: str | None) -> bool:
    """Return whether the template of a ``tokenizer.json`` begins with BOS."""
    single = (content.get("post_processor") or {}).get("single") or [{}]
    return bos is not None and single[0].get("SpecialToken", {}).get("id") == bos


def _reordered_merges(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merge rules of a ``tokenizer.json`` in the order of :func:`merge_rules`.

    ``transformers`` 5 writes the splits of a piece with the shortest left part first; SentencePiece merges the
    longest first. ``transformers`` also ranks every piece by its id.
    """
    rules = [tuple(rule.split(" ") if isinstance(rule, str) else rule) for rule in content["model"]["merges"]]
    vocabulary = content["model"]["vocab"]
    is_llama = all(vocabulary.get(piece) == index for piece, index in _LLAMA_PIECES.items())
    ranks: dict[str, int] = {}
    for left, right in rules:
        ranks.setdefault(left + right, len(ranks))

    def order(rule: tuple[str, str]) -> tuple[int, int, int]:
        left, right = rule
        last = is_llama and not (left + right).strip(SPACE)
        return len(ranks) if last else ranks[left + right], -len(left), -len(right)

    return sorted(((left, right) for left, right in rules), key=order)


def build_slow_llama_tokenizer(file: Path, config: TokenizerConfig, content: dict[str, Any] | None) -> Tokenizer:
    """Return the tokenizer of ``file``.

    Args:
        file: ``tokenizer.model``, or a ``tokenizer.json`` for which :func:`is_sentencepiece` holds.
        config: Configuration of the tokenizer.
        content: Content of ``tokenizer.json``, if there is one.

    Raises:
        FusionError: A file is damaged, a setting is not supported, or the files contradict each other.
    """
    _require_supported(config)
    vocabulary, merges = _read_vocabulary(file, content)
    named = config.named_tokens()
    added = _added_tokens(config, vocabulary, named, file)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    # Set before tokens are added: it decides how they are found.
    tokenizer.normalizer = _normalizer(added.values(), named, config.flag("add_prefix_space", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)
    for _, token in sorted(added.items()):
        # normalized=True: split off after the normalizer has processed the whole text (steps 1 to 3).
        whole = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=True)
        add_token(tokenizer, whole, token.special or token.content in named)
    bos = config.bos
    if bos is not None and config.flag("add_bos_token", content is None or _adds_bos(content, bos)):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _read_vocabulary(file: Path, content: dict[str, Any] | None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ids of all pieces, and the merge rules."""
    if content is not None and file.name == "tokenizer.json":
        return dict(content["model"]["vocab"]), _reordered_merges(content)
    pieces = read_pieces(file)
    return {piece.text: index for index, piece in enumerate(pieces)}, merge_rules(pieces)


def _added_tokens(
    config: TokenizerConfig, vocabulary: dict[str, int], named: set[str], file: Path
) -> dict[int, AddedToken]:
    """Return added and named tokens by id, and add their ids to ``vocabulary``.

    Raises :class:`FusionError` for an id that contradicts the vocabulary, and for a setting that is not supported.
    """
    texts = {index: text for text, index in vocabulary.items()}
    added = config.added_tokens()
    for index, token in added.items():
        in_place = index >= 0 and texts.get(index, token.content) == token.content
        if not in_place or vocabulary.setdefault(token.content, index) != index:
            raise FusionError(
                f"{config.file} gives {token.content} the id {index}, which contradicts {file.name}: take both files "
                "from the same checkpoint."
            )
        if token.single_word:
            raise FusionError(
                f"{config.file} has {token.content} with single_word=true; expected false, as in released checkpoints. "
                "Set it to false if the model was trained so."
            )
    for name in sorted(named - {token.content for token in added.values()}):
        if name not in vocabulary:
            raise FusionError(
                f"{config.file} names the special token {name}, which has no id: add it to added_tokens_decoder."
            )
        added[vocabulary[name]] = AddedToken(name, normalized=False, special=True)
    return added


def _require_supported(config: TokenizerConfig) -> None:
    # Before version 5, a missing or null "legacy" means true.
    for setting, default in (("legacy", not config.is_version_5), ("add_eos_token", False)):
        if config.flag(setting, default):
            raise FusionError(
                f"{config.file} does not have {setting}=false, as released checkpoints have: set it to false if the "
                "model was trained so; other values are not supported."
            )


def _normalizer(added: Iterable[AddedToken], named: set[str], prefix: bool) -> normalizers.Normalizer:
    """Return the normalizer for steps 1 and 3: U+2581 to spaces, then one U+2581 in front of the text.

    The library finds added tokens by normalizing their content too. So a text that is exactly one unnamed added token
    gets no U+2581; the slow tokenizer keeps it.
    """
    spaces = normalizers.Replace(SPACE, " ")
    if not prefix:
        return spaces
    exceptions = [r"\z"]
    for token in added:
        # With lstrip, spaces before the token belong to it.
        before = r"\s*" if token.lstrip else ""
        after = "" if token.content in named else r"\z"
        exceptions.append(before + re.escape(token.content) + after)
    start = Regex(rf"\A(?!{'|'.join(exceptions)})")
    return normalizers.Sequence([spaces, normalizers.Replace(start, SPACE)])


def add_token(tokenizer: Tokenizer, token: AddedToken, special: bool) -> None:
    """Add a token. Decoding with ``skip_special_tokens`` skips it if it is ``special``."""
    if special:
        tokenizer.add_special_tokens([token])
    else:
        tokenizer.add_tokens([token])
