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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fusion_edge.export.checkpoint.input_files import disguise, read_file
from fusion_edge.export.checkpoint.sentencepiece_model import SPACE, merge_rules, read_pieces
from fusion_edge.export.checkpoint.tokenizer_config import TokenizerConfig
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.tokenization.tokenizer import build_tokenizer, parse_tokenizer

LARGEST_TOKENIZER = 64 << 20  # bytes of tokenizer.json; Llama's, the largest known, has 17 million
REQUIRED_TOKENS = ("<vision_start>", "<vision_end>")

# Where Llama's and Phi's vocabulary begins. All its runs of spaces have the lowest score, and not that of their place.
_LLAMA_PIECES = {SPACE * 2: 259, f"{SPACE}t": 260, "er": 261}


def tokenizer_json(folder: Path) -> str:
    """The content of a ``tokenizer.json`` (format of the ``tokenizers`` library) for a checkpoint folder.

    Its ``encode(text).ids`` are the released tokenizer's ids, BOS included where that adds one. The slow
    ``LlamaTokenizer`` is rebuilt from ``tokenizer.model`` even if a ``tokenizer.json`` lies beside it: the
    released models were trained with it (FUSION.md, "The four released models"). Where ``transformers`` 5 has left
    a ``tokenizer.json`` alone, it is rebuilt from the pieces in that.

    Raises:
        FusionError: Tokenizer files missing or damaged, a kind or setting of tokenizer that is not supported,
            or a checkpoint without ``<vision_start>`` and ``<vision_end>``.
    """
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model_file.exists() and not json_file.exists():
        raise FusionError(
            f"{folder} has no tokenizer, expected tokenizer.json (Llama) or tokenizer.model (Phi): "
            "pass the complete checkpoint folder."
        )
    config = TokenizerConfig(folder, None)
    is_llama = config.class_name == "LlamaTokenizer"
    if json_file.exists() and (config.is_version_5 or not (model_file.exists() and is_llama)):
        content = _read_json(json_file)
        config = TokenizerConfig(folder, content)
        if config.is_version_5 and _is_sentencepiece(content):
            tokenizer = _from_sentencepiece(model_file if model_file.exists() else json_file, config, content)
        elif is_llama and content["model"].get("byte_fallback"):
            raise FusionError(
                f"{model_file} is missing, and {json_file.name} cuts some texts into other tokens than the slow "
                "LlamaTokenizer that FUSION-Phi was trained with: add the tokenizer.model of the checkpoint."
            )
        else:
            tokenizer = _from_json(json_file, config, content)
    elif is_llama or (config.is_version_5 and config.class_name == "TokenizersBackend"):
        tokenizer = _from_sentencepiece(model_file, config, None)
    else:
        raise FusionError(
            f"{config.file} asks for {config.class_name}, which cannot be built from tokenizer.model, "
            "expected LlamaTokenizer: add the tokenizer.json that the `transformers` library saves."
        )
    for token in REQUIRED_TOKENS:
        if tokenizer.encode(token, add_special_tokens=False).tokens != [token]:
            raise FusionError(
                f"The tokenizer in {folder} has no added token {token}, which every FUSION checkpoint has: "
                "pass a FUSION checkpoint, not the language model that it was made from."
            )
    text: str = tokenizer.to_str()
    return text


# --- tokenizer.json -------------------------------------------------------------------------------


def _read_json(json_file: Path) -> dict[str, Any]:
    content = read_file(json_file, LARGEST_TOKENIZER)
    try:
        # A training run may save its truncation and padding; the released code switches them off.
        data = parse_tokenizer(content) | {"truncation": None, "padding": None}
        build_tokenizer(data)
    except ValueError as error:
        if what := disguise(content[:64]):
            raise FusionError(f"{json_file} is {what}.") from None
        raise FusionError(
            f"{json_file} is no tokenizer that the `tokenizers` library can load ({error}): download it "
            "again, or update that library."
        ) from error
    return data


def _from_json(json_file: Path, config: TokenizerConfig, content: dict[str, Any]) -> Tokenizer:
    tokenizer = build_tokenizer(content)
    config.named_tokens()  # which only checks them: the file itself has what they do
    for index, token in sorted(config.added_tokens().items()):
        _add(tokenizer, token, token.special)  # does nothing for one that tokenizer.json already has
        if tokenizer.token_to_id(token.content) != index:
            raise FusionError(
                f"{config.file} gives {token.content} the id {index}, {json_file.name} gives it "
                f"{tokenizer.token_to_id(token.content)}: take both files from the same checkpoint."
            )
    return tokenizer


def _add(tokenizer: Tokenizer, token: AddedToken, special: bool) -> None:
    """``special`` tokens are left out when ids are decoded with ``skip_special_tokens``."""
    if special:
        tokenizer.add_special_tokens([token])
    else:
        tokenizer.add_tokens([token])


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is what ``transformers`` 5 makes of a SentencePiece model without normalization."""
    return bool(content["model"].get("byte_fallback")) and content.get("normalizer") is None


def _adds_bos(content: dict[str, Any], bos: str | None) -> bool:
    """Whether the template of a ``tokenizer.json`` begins with BOS."""
    single = (content.get("post_processor") or {}).get("single") or [{}]
    return bos is not None and single[0].get("SpecialToken", {}).get("id") == bos


def _reordered(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The merge rules of a ``tokenizer.json`` in the order of :func:`merge_rules`.

    ``transformers`` 5 writes the cuts of a piece with the shortest left part first, where SentencePiece begins with the
    longest, and ranks every piece by its id.
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


# --- SentencePiece --------------------------------------------------------------------------------


def _from_sentencepiece(file: Path, config: TokenizerConfig, content: dict[str, Any] | None) -> Tokenizer:
    """The slow LlamaTokenizer of ``file``, a ``tokenizer.model`` or the ``tokenizer.json`` with that ``content``."""
    _require_supported(config)
    if content is not None and file.name == "tokenizer.json":
        vocabulary: dict[str, int] = dict(content["model"]["vocab"])
        merges = _reordered(content)
    else:
        pieces = read_pieces(file)
        vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
        merges = merge_rules(pieces)
    texts = {index: text for text, index in vocabulary.items()}
    added = config.added_tokens()
    named = config.named_tokens()
    for index, token in added.items():
        in_place = index >= 0 and texts.get(index, token.content) == token.content
        if not in_place or vocabulary.setdefault(token.content, index) != index:
            raise FusionError(
                f"{config.file} gives {token.content} the id {index}, which {file.name} contradicts: "
                "take both files from the same checkpoint."
            )
        if token.single_word:
            raise FusionError(
                f"{config.file} has {token.content} with single_word=true, supported is false as in the "
                "released checkpoints: set it so if the model was trained with it."
            )
    contents = {token.content for token in added.values()}
    for name in sorted(named - contents):
        if name not in vocabulary:
            raise FusionError(f"{config.file} names the special token {name}, which has no id: add it there.")
        added[vocabulary[name]] = AddedToken(name, normalized=False, special=True)

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    # Set before tokens are added, because it decides how they are found.
    tokenizer.normalizer = _normalizer(added.values(), named, config.flag("add_prefix_space", True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)
    for _, token in sorted(added.items()):
        # normalized=True: cut out after the normalizer has seen the text as a whole (steps 1 to 3).
        whole = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=True)
        _add(tokenizer, whole, token.special or token.content in named)
    bos = config.bos
    if bos is not None and config.flag("add_bos_token", content is None or _adds_bos(content, bos)):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _require_supported(config: TokenizerConfig) -> None:
    # An absent or null "legacy" means true, to versions before 5.
    for setting, default in (("legacy", not config.is_version_5), ("add_eos_token", False)):
        if config.flag(setting, default):
            raise FusionError(
                f"{config.file} does not have {setting}=false, the only value supported and that of the "
                "released checkpoints: set it so if the model was trained with it."
            )


def _normalizer(added: Iterable[AddedToken], named: set[str], prefix: bool) -> normalizers.Normalizer:
    """Steps 1 and 3: visible spaces to spaces, then one visible space before the text.

    The library applies the same normalizer to the added tokens' own text to find them afterwards, so a text
    that is exactly one unnamed added token gets no space either (the slow tokenizer keeps one there).
    """
    spaces = normalizers.Replace(SPACE, " ")
    if not prefix:
        return spaces
    exceptions = [r"\z"]
    for token in added:
        # With lstrip, the spaces between the start and the token belong to the token.
        before = r"\s*" if token.lstrip else ""
        after = "" if token.content in named else r"\z"
        exceptions.append(before + re.escape(token.content) + after)
    start = Regex(rf"\A(?!{'|'.join(exceptions)})")
    return normalizers.Sequence([spaces, normalizers.Replace(start, SPACE)])
