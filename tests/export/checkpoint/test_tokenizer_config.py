"""Supported settings of tokenizer files, and errors for all others."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizer_files import (
    IDENTITY,
    LETTERS,
    LLAMA,
    NORMAL,
    PHI,
    RESERVED,
    USER_DEFINED,
    added,
    load,
    sentencepiece_model,
    write_phi,
)
from tokenizers import Tokenizer

from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.errors import FusionError


def test_bos_and_missing_prefix_space(tmp_path: Path) -> None:
    model = sentencepiece_model([*RESERVED, *LETTERS])
    bos = load(write_phi(tmp_path, model, add_bos_token=True))
    assert bos.encode("a").tokens == ["<s>", "▁", "a"]
    assert bos.encode("a", add_special_tokens=False).tokens == ["▁", "a"]
    assert load(write_phi(tmp_path, model, add_prefix_space=False)).encode("a b").tokens == ["a", "▁", "b"]


def test_phi_is_rebuilt_despite_tokenizer_json(tmp_path: Path) -> None:
    folder = shutil.copytree(PHI, tmp_path / "phi", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_json(folder) == tokenizer_json(PHI)


def copy_llama(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, folder / name)
    return folder


def edit_json(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_saved_truncation_and_padding_are_disabled(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path)
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(max_length=2)
    saved.enable_padding(length=50)
    saved.save(str(folder / "tokenizer.json"))
    assert tokenizer_json(folder) == tokenizer_json(LLAMA)


def test_tokens_that_only_the_config_adds(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path)
    edit_json(folder / "tokenizer.json", lambda content: content["added_tokens"].pop())
    assert load(folder).encode("a<vision_end>b").ids == load(LLAMA).encode("a<vision_end>b").ids


def test_contradicting_token_ids(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path)
    edit_json(
        folder / "tokenizer_config.json",
        lambda content: content["added_tokens_decoder"].update({"1009": {"content": "<vision_end>"}}),
    )
    with pytest.raises(FusionError, match=r"<vision_end> the id 1009, but tokenizer\.json 1006"):
        tokenizer_json(folder)


# --- Errors ---------------------------------------------------------------------------------------


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match=r"no tokenizer; expected tokenizer\.json .* or tokenizer\.model"):
        tokenizer_json(tmp_path)


def test_no_tokenizer_config(tmp_path: Path) -> None:
    shutil.copy(PHI / "tokenizer.model", tmp_path)
    with pytest.raises(FusionError, match=r"tokenizer_config\.json is missing"):
        tokenizer_json(tmp_path)


def test_unreadable_tokenizer_json(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(FusionError, match=r"tokenizer\.json cannot be loaded"):
        tokenizer_json(folder)


def test_unsupported_tokenizer_class(tmp_path: Path) -> None:
    write_phi(tmp_path, sentencepiece_model([*RESERVED, *LETTERS]), tokenizer_class="T5Tokenizer")
    with pytest.raises(FusionError, match="names T5Tokenizer"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize("missing", ["<vision_start>", "<vision_end>"])
def test_vision_tokens_must_exist(tmp_path: Path, missing: str) -> None:
    write_phi(
        tmp_path,
        sentencepiece_model([*RESERVED, *LETTERS]),
        added_tokens_decoder=added(*{"<vision_start>", "<vision_end>"} - {missing}, start=500),
    )
    with pytest.raises(FusionError, match=f"no added token {missing}"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"legacy": True}, "does not have legacy=false"),
        ({"legacy": None}, "does not have legacy=false"),
        ({"add_eos_token": True}, "does not have add_eos_token=false"),
        ({"added_tokens_decoder": None}, "no valid added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "no valid added_tokens_decoder"),
        ({"added_tokens_decoder": {"5": "<a>"}}, "no valid added_tokens_decoder"),
        ({"added_tokens_decoder": added("<a>", start=1)}, "<a> the id 1, which contradicts tokenizer.model"),
        ({"added_tokens_decoder": added("<s>", start=700)}, "<s> the id 700, which contradicts tokenizer.mo"),
        ({"added_tokens_decoder": added("<a>", start=-1)}, "<a> the id -1, which contradicts tokenizer.model"),
        ({"added_tokens_decoder": added("<a>", start=700, single_word=True)}, "<a> with single_word=true"),
        ({"pad_token": "<pad>"}, "names the special token <pad>, which has no id"),
    ],
)
def test_unsupported_tokenizer_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_phi(tmp_path, sentencepiece_model([*RESERVED, *LETTERS]), **settings)
    with pytest.raises(FusionError, match=re.escape(message)):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (sentencepiece_model([*RESERVED, *LETTERS], trainer={3: 1, 35: 1}), "is a unigram model"),
        (sentencepiece_model([*RESERVED, *LETTERS], trainer={35: 1}), "is a unigram model"),
        (sentencepiece_model([*RESERVED, *LETTERS], trainer={3: 4, 35: 1}), "has the model type 4"),
        (sentencepiece_model([*RESERVED, *LETTERS], trainer={3: 2}), "has no byte fallback"),
        (sentencepiece_model([*RESERVED, *LETTERS], normalizer=IDENTITY | {2: b"map"}), "normalizes text"),
        (sentencepiece_model([*RESERVED, *LETTERS], normalizer=IDENTITY | {4: 1}), "normalizes text"),
        (sentencepiece_model([*RESERVED, *LETTERS], normalizer=IDENTITY | {5: 0}), "normalizes text"),
        (sentencepiece_model([*RESERVED, *LETTERS, ("x", 0.0, USER_DEFINED)]), "user-defined"),
        (sentencepiece_model([*RESERVED[1:], *LETTERS]), "not exactly one unknown"),
        (sentencepiece_model([*RESERVED[:-1], *LETTERS]), "lacks byte pieces"),
        (sentencepiece_model([*RESERVED, *LETTERS, LETTERS[1]]), "equal score"),
        (sentencepiece_model([*RESERVED, *LETTERS, ("ab", -1.0, NORMAL), ("bc", -1.0, NORMAL)]), "equal score"),
        (b"", "truncated or not a SentencePiece model"),
        (b"not a protocol buffer", "truncated or not a SentencePiece model"),
    ],
)
def test_unsupported_sentencepiece_models(tmp_path: Path, model: bytes, message: str) -> None:
    write_phi(tmp_path, model)
    with pytest.raises(FusionError, match=message):
        tokenizer_json(tmp_path)


SMALL_MODEL = sentencepiece_model([*RESERVED, *LETTERS])


@given(length=st.integers(0, len(SMALL_MODEL) - 1))
@settings(max_examples=100, deadline=None)
def test_truncated_models(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    folder = write_phi(tmp_path_factory.getbasetemp() / "truncated", SMALL_MODEL[:length])
    with pytest.raises(FusionError, match=r"tokenizer\.model is truncated or not a SentencePiece model"):
        tokenizer_json(folder)


@given(position=st.integers(0, len(SMALL_MODEL) - 1), byte=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_damaged_models_give_no_traceback(tmp_path_factory: pytest.TempPathFactory, position: int, byte: int) -> None:
    damaged = bytearray(SMALL_MODEL)
    damaged[position] = byte
    folder = write_phi(tmp_path_factory.getbasetemp() / "damaged", bytes(damaged))
    with contextlib.suppress(FusionError):
        assert json.loads(tokenizer_json(folder))["model"]["type"] == "BPE"
