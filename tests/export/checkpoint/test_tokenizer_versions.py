"""Tokenizer files of ``transformers`` 4.30 to 5 give the ids of the released tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import GOLDEN
from support.tokenizer_files import LETTERS, LLAMA, NORMAL, PHI, RESERVED, Piece, load, sentencepiece_model, write_phi
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusion_edge.export.checkpoint.sentencepiece_model import read_pieces
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.errors import FusionError

NAMES = ("endoftext", "assistant", "placeholder1", "system", "end", "user")
EXTRA = [*(f"<|{name}|>" for name in NAMES), "<vision_start>", "<vision_end>"]
PHI_5 = {
    "add_prefix_space": True,
    "backend": "tokenizers",
    "bos_token": "<s>",
    "eos_token": "<|endoftext|>",
    "extra_special_tokens": EXTRA,
    "is_local": True,
    "pad_token": "<unk>",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
LLAMA_5 = {"backend": "tokenizers", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
           "tokenizer_class": "TokenizersBackend"}  # fmt: skip


def write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def ranks_by_id(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return merge rules as ``transformers`` 5 writes them: pieces by id, splits with the shortest left part first."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(vocabulary, key=vocabulary.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def phi_json_of_version_5(model_file: Path, added: dict[str, Any]) -> dict[str, Any]:
    """Write what ``transformers`` 5.24 saves of Phi's tokenizer (compared with it)."""
    vocabulary = {piece.text: index for index, piece in enumerate(read_pieces(model_file))}
    tokenizer = Tokenizer(models.BPE(vocabulary, ranks_by_id(vocabulary), fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content["added_tokens"] = [{"id": int(index), **token} for index, token in added.items()]
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
    return content


@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("with_model", [True, False])
def test_phi_of_version_5(tmp_path: Path, class_name: str, with_model: bool) -> None:
    added = json.loads((PHI / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    write(tmp_path / "tokenizer_config.json", PHI_5 | {"tokenizer_class": class_name})
    write(tmp_path / "tokenizer.json", phi_json_of_version_5(PHI / "tokenizer.model", added))
    if with_model:
        shutil.copy(PHI / "tokenizer.model", tmp_path)
    assert tokenizer_json(tmp_path) == tokenizer_json(PHI)


@pytest.mark.parametrize("extra", [["<vision_start>", "<vision_end>"], {}, {"image_token": "<vision_start>"}, None])
def test_llama_of_version_5(tmp_path: Path, extra: object) -> None:
    write(tmp_path / "tokenizer_config.json", LLAMA_5 | {"extra_special_tokens": extra})
    shutil.copy(LLAMA / "tokenizer.json", tmp_path)
    assert tokenizer_json(tmp_path) == tokenizer_json(LLAMA)


def test_bos_of_version_5_is_in_the_template(tmp_path: Path) -> None:
    write_phi(tmp_path, sentencepiece_model([*RESERVED, *LETTERS]), add_bos_token=True)
    expected = tokenizer_json(tmp_path)
    added = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = phi_json_of_version_5(tmp_path / "tokenizer.model", {i: {**flags, **token} for i, token in added.items()})
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"]["single"].insert(0, bos)
    content["post_processor"]["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    write(tmp_path / "tokenizer.json", content)
    write(tmp_path / "tokenizer_config.json", {"backend": "tokenizers", "tokenizer_class": "LlamaTokenizer"})
    assert tokenizer_json(tmp_path) == expected
    (tmp_path / "tokenizer.model").unlink()
    assert tokenizer_json(tmp_path) == expected


def test_runs_of_spaces_of_llamas_vocabulary(tmp_path: Path) -> None:
    """Runs of spaces have the lowest score, independent of their ids."""
    scored: list[Piece] = [("▁▁", -1e9, NORMAL), ("▁t", -1.0, NORMAL), ("er", -2.0, NORMAL), ("▁▁▁▁", -1e9, NORMAL)]
    letters: list[Piece] = [(letter, -1e6 - i, NORMAL) for i, letter in enumerate("▁ter")]
    pieces = [*RESERVED, *scored, *letters]
    write_phi(tmp_path, sentencepiece_model(pieces))
    expected = load(tmp_path)
    added = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = phi_json_of_version_5(tmp_path / "tokenizer.model", {i: {**flags, **token} for i, token in added.items()})
    write(tmp_path / "tokenizer.json", content)
    config = {"backend": "tokenizers", "tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    write(tmp_path / "tokenizer_config.json", config)
    (tmp_path / "tokenizer.model").unlink()
    for text in ("  t", "   er", "     ter", "t  t", " "):
        assert load(tmp_path).encode(text).ids == expected.encode(text).ids


def copy_phi(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    for file in PHI.glob("*token*"):
        shutil.copy(file, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    change(config)
    write(folder / "tokenizer_config.json", config)
    return folder


def test_added_tokens_of_older_versions(tmp_path: Path) -> None:
    """Ids equal those of ``transformers`` 4.46.3: flags that only added_tokens_decoder has are unset."""
    folder = copy_phi(tmp_path, lambda config: config.pop("added_tokens_decoder"))
    older, released = load(folder), load(PHI)
    assert older.encode("x<|endoftext|> y").ids == released.encode("x<|endoftext|> y").ids
    assert older.encode("<|end|>\n").ids == [1204, *released.encode("x\n").ids[-1:]]
    for entry in json.loads((GOLDEN / "tokens_phi.json").read_text(encoding="utf-8")):
        if "|>" not in entry["text"] and "</s>" not in entry["text"]:
            assert older.encode(entry["text"]).ids == entry["ids"]


def test_missing_added_tokens(tmp_path: Path) -> None:
    folder = copy_phi(tmp_path, lambda config: config.pop("added_tokens_decoder"))
    (folder / "added_tokens.json").unlink()
    with pytest.raises(FusionError, match="no valid added_tokens_decoder"):
        tokenizer_json(folder)


def test_byte_order_marks(tmp_path: Path) -> None:
    for file in LLAMA.glob("tokenizer*.json"):
        (tmp_path / file.name).write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert tokenizer_json(tmp_path) == tokenizer_json(LLAMA)


@pytest.mark.parametrize(("source", "name"), [(PHI, "tokenizer.model"), (LLAMA, "tokenizer.json")])
def test_git_lfs_pointers(tmp_path: Path, source: Path, name: str) -> None:
    for file in source.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FusionError, match=f"{name} is a Git LFS pointer, .* `git lfs pull`"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token": ["x"]},
        {"pad_token": 3},
        {"bos_token": {"content": None}},
        {"eos_token": {}},
        {"additional_special_tokens": 1.5},
        {"additional_special_tokens": [1, "a"]},
        {"additional_special_tokens": "<a>"},
        {"extra_special_tokens": True},
        {"extra_special_tokens": {"a": ["b"]}},
        {"add_bos_token": "false"},
        {"add_prefix_space": 1},
        {"legacy": "no"},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"5000": {"content": 7}}},
        {"added_tokens_decoder": {"5000": {"content": ""}}},
        {"added_tokens_decoder": {"5000": {"content": "\ud800"}}},
        {"added_tokens_decoder": {"5000": {"content": "x" * 5000}}},
        {"added_tokens_decoder": {"5000": {"content": "<a>", "lstrip": "yes"}}},
        {"added_tokens_decoder": {"5000": {"content": "<a>"}, "05000": {"content": "<b>"}}},
        *({"added_tokens_decoder": {index: {"content": "<a>"}}} for index in ("4294967296", "2000000000", "-1", "1.0")),
        {"added_tokens_decoder": {"1" * 5000: {"content": "<a>"}}},
    ],
    ids=lambda change: str(change)[:60],
)  # fmt: skip
def test_wrong_types_and_ids(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(FusionError, match="tokenizer_config") as caught:
        tokenizer_json(copy_phi(tmp_path, lambda config: config.update(change)))
    assert len(str(caught.value)) < 500
