"""Return a checkpoint's tokenizer as ``tokenizer.json``, with exactly the ids of the released tokenizer.

Llama checkpoints have a ``tokenizer.json``. Phi's slow tokenizer is rebuilt, see ``slow_llama_tokenizer.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fusion_edge.export.checkpoint.input_files import identify_format, read_file
from fusion_edge.export.checkpoint.slow_llama_tokenizer import add_token, build_slow_llama_tokenizer, is_sentencepiece
from fusion_edge.export.checkpoint.tokenizer_config import TokenizerConfig
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.tokenization.tokenizer import build_tokenizer, parse_tokenizer

LARGEST_TOKENIZER = 64 << 20  # bytes of tokenizer.json; Llama's, the largest known, has 17 MB
REQUIRED_TOKENS = ("<vision_start>", "<vision_end>")


def tokenizer_json(folder: Path) -> str:
    """Return the content of ``tokenizer.json`` (format of the ``tokenizers`` library) for a checkpoint folder.

    Its ``encode(text).ids`` are the released tokenizer's ids, BOS included if that adds one. The slow
    ``LlamaTokenizer`` is rebuilt from ``tokenizer.model`` even if there is a ``tokenizer.json``: the released models
    were trained with it (docs/fusion-model.md, "The four released models"). If ``transformers`` 5 has saved a
    ``tokenizer.json`` only, it is rebuilt from the vocabulary in that.

    Raises:
        FusionError: Files are missing or damaged, the kind or a setting of the tokenizer is not supported, or the
            tokens ``<vision_start>`` and ``<vision_end>`` are missing.
    """
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model_file.exists() and not json_file.exists():
        raise FusionError(
            f"{folder} has no tokenizer; expected tokenizer.json (Llama) or tokenizer.model (Phi). Pass the complete "
            "checkpoint folder."
        )
    config = TokenizerConfig(folder, None)
    is_llama = config.class_name == "LlamaTokenizer"
    if json_file.exists() and (config.is_version_5 or not (model_file.exists() and is_llama)):
        content = _read_json(json_file)
        config = TokenizerConfig(folder, content)
        if config.is_version_5 and is_sentencepiece(content):
            tokenizer = build_slow_llama_tokenizer(model_file if model_file.exists() else json_file, config, content)
        elif is_llama and content["model"].get("byte_fallback"):
            raise FusionError(
                f"{model_file} is missing: {json_file.name} encodes some texts differently from the slow "
                "LlamaTokenizer that FUSION-Phi was trained with. Add the checkpoint's tokenizer.model."
            )
        else:
            tokenizer = _from_json(json_file, config, content)
    elif is_llama or (config.is_version_5 and config.class_name == "TokenizersBackend"):
        tokenizer = build_slow_llama_tokenizer(model_file, config, None)
    else:
        raise FusionError(
            f"{config.file} names {config.class_name}, which cannot be built from tokenizer.model; expected "
            "LlamaTokenizer. Add the tokenizer.json that `transformers` saves."
        )
    for token in REQUIRED_TOKENS:
        if tokenizer.encode(token, add_special_tokens=False).tokens != [token]:
            raise FusionError(
                f"The tokenizer in {folder} has no added token {token}, which every FUSION checkpoint has: pass a "
                "FUSION checkpoint, not its base language model."
            )
    text: str = tokenizer.to_str()
    return text


def _read_json(json_file: Path) -> dict[str, Any]:
    content = read_file(json_file, LARGEST_TOKENIZER)
    try:
        # Training may save truncation and padding; the released code disables them.
        data = parse_tokenizer(content) | {"truncation": None, "padding": None}
        build_tokenizer(data)
    except ValueError as error:
        if what := identify_format(content[:64]):
            raise FusionError(f"{json_file} is {what}.") from None
        raise FusionError(
            f"{json_file} cannot be loaded by the `tokenizers` library ({error}): download it again, or update the "
            "library."
        ) from error
    return data


def _from_json(json_file: Path, config: TokenizerConfig, content: dict[str, Any]) -> Tokenizer:
    tokenizer = build_tokenizer(content)
    config.named_tokens()  # only to validate them: tokenizer.json itself handles them
    for index, token in sorted(config.added_tokens().items()):
        add_token(tokenizer, token, token.special)  # no effect if tokenizer.json has it
        if tokenizer.token_to_id(token.content) != index:
            raise FusionError(
                f"{config.file} gives {token.content} the id {index}, but {json_file.name} "
                f"{tokenizer.token_to_id(token.content)}: take both files from the same checkpoint."
            )
    return tokenizer
