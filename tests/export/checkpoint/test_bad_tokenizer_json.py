"""Tokenizer files that make the ``tokenizers`` library abort, panic, hang or allocate gigabytes."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizer_files import LLAMA, PHI, write_phi

from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.bundle.files import digest
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.prompts.prompt import PromptEncoder
from fusion_edge.runtime.tokenization.regex_cost import check_regex
from fusion_edge.runtime.tokenization.schema import check_tokenizer
from fusion_edge.runtime.tokenization.tokenizer import build_tokenizer, parse_tokenizer

Change = Callable[[dict[str, Any]], object]
FOLDERS = {"llama": LLAMA, "phi": PHI}


@pytest.fixture(scope="module")
def contents() -> dict[str, str]:
    return {name: tokenizer_json(folder) for name, folder in FOLDERS.items()}


def test_exported_tokenizers_are_accepted(contents: dict[str, str]) -> None:
    for content in contents.values():
        assert build_tokenizer(parse_tokenizer(content.encode())).to_str() == content


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        value = {"type": "Sequence", "normalizers": [value]}
    return value


def template(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["post_processor"]["processors"][1]
    return found


BOS = "<|begin_of_text|>"
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
CHANGES: list[Change] = [
    lambda c: c["model"].update(continuing_subword_prefix="0"),
    lambda c: c["model"].update(end_of_word_suffix="</w>"),
    lambda c: c["model"].update(dropout=0.5),
    lambda c: c["model"].update(type="Unigram"),
    lambda c: c["model"].update(unk_token=7),
    lambda c: c["model"].update(cache_capacity=10**12),
    lambda c: c["model"].pop("merges"),
    lambda c: c.pop("model"),
    lambda c: c["model"]["vocab"].update(x=2_000_000_000),
    lambda c: c["model"]["vocab"].update(x=-1),
    lambda c: c["model"]["vocab"].update(x=1.0),
    lambda c: c["model"]["vocab"].update(x=True),
    lambda c: c["model"]["vocab"].update(xyz=5),
    lambda c: c["model"]["vocab"].update({"x" * 5000: 1007}),
    lambda c: c["model"]["merges"].append(["x"]),
    lambda c: c["model"]["merges"].append(["", ""]),
    lambda c: c["model"]["merges"].append("a b c"),
    lambda c: c["model"]["merges"].append(["qq", "rr"]),
    lambda c: c["model"]["merges"].append([BOS, BOS]),
    lambda c: c["model"]["merges"].append(7),
    lambda c: c["added_tokens"][0].update(id=4_000_000_000),
    lambda c: c["added_tokens"][0].update(id=2**32),
    lambda c: c["added_tokens"][0].update(id=-1),
    lambda c: c["added_tokens"][0].update(content=""),
    lambda c: c["added_tokens"][0].update(content="x" * 100_000),
    lambda c: c["added_tokens"][0].update(lstrip=1),
    lambda c: c["added_tokens"][0].pop("special"),
    lambda c: c["added_tokens"].append(dict(c["added_tokens"][0])),
    lambda c: c["added_tokens"].append(7),
    lambda c: c.update(added_tokens=7),
    lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 1000}),
    lambda c: c.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": "x"}),
    lambda c: c.update(normalizer={"type": "Prepend", "prepend": "x" * 1000}),
    lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}),
    lambda c: c.update(normalizer={"type": ["NFC"]}),
    lambda c: c.update(normalizer=nested(2)),
    lambda c: c.update(normalizer=nested(50)),
    lambda c: c.update(pre_tokenizer={"type": "UnicodeScripts"}),
    lambda c: c.update(pre_tokenizer=SPLIT | {"pattern": {"Regex": "(("}}),
    lambda c: c.update(pre_tokenizer=SPLIT | {"behavior": "Other"}),
    lambda c: c.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    lambda c: c.update(decoder={"type": "Strip", "content": " ", "start": 10**12, "stop": 0}),
    lambda c: c.update(decoder={"type": "Strip", "content": " ", "start": 0, "stop": 3}),
    lambda c: c.update(decoder=None),
    lambda c: c.pop("decoder"),
    lambda c: c.update(padding={"strategy": {"Fixed": 10**12}}),
    lambda c: c.update(truncation={"max_length": 0}),
    lambda c: template(c).update(special_tokens={}),
    lambda c: template(c)["special_tokens"][BOS].update(ids=[]),
    lambda c: template(c)["special_tokens"][BOS].update(ids=[2**31]),
    lambda c: template(c)["special_tokens"][BOS].update(ids=["x"]),
    lambda c: template(c)["special_tokens"][BOS].update(tokens=["unknown"]),
    lambda c: template(c)["special_tokens"][BOS].update(tokens=[["x"]]),
    lambda c: template(c)["single"].append({"SpecialToken": {"id": "unknown", "type_id": 0}}),
    lambda c: template(c)["single"].append({"Sequence": {"id": "C", "type_id": 0}}),
    lambda c: template(c)["single"].append("$A"),
    lambda c: template(c)["single"].extend([{"Sequence": {"id": "A", "type_id": 0}}] * 1000),
    lambda c: c.update(unknown=1),
    lambda c: c.update(version="9.0"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_dangerous_tokenizer_json_is_refused(
    contents: dict[str, str], change: Change, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(contents["llama"])
    change(content)
    with pytest.raises(ValueError, match=r".") as caught:
        build_tokenizer(content)
    assert len(str(caught.value)) < 300
    assert "panic" not in capfd.readouterr().err


def test_bundle_ids_have_embedding_rows(contents: dict[str, str]) -> None:
    check_tokenizer(json.loads(contents["phi"]), 1208)
    with pytest.raises(ValueError, match="has the id 1207, expected 0 to 1206"):
        check_tokenizer(json.loads(contents["phi"]), 1207)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"0," * 5_000_000 + b"0]",
     b"[" + b"{}," * 200_000 + b"0]", b'{"x": ' + b"9" * 10_000 + b"}", b" " * (33 << 20)],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_invalid_tokenizer_json(content: bytes) -> None:
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"."):
        build_tokenizer(parse_tokenizer(content))
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


WORDS = st.one_of(st.text(max_size=4), st.sampled_from(["type", "Sequence", "Split", "Replace", "BPE", BOS, "(a+)+"]))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), WORDS)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


@given(data=st.data(), value=VALUES)
@settings(max_examples=300, deadline=None)
def test_one_value_replaced_by_any_other(contents: dict[str, str], data: st.DataObject, value: Any) -> None:
    content = json.loads(contents[data.draw(st.sampled_from(sorted(contents)))])
    at: Any = content
    while isinstance(at, dict | list) and at:
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        key: Any = data.draw(st.sampled_from(keys[:40]))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            at[key] = value
            break
        at = at[key]
    try:
        tokenizer = build_tokenizer(content)
    except ValueError:
        return
    ids = tokenizer.encode("Hello <|end|> world  ▁ é").ids
    assert isinstance(tokenizer.decode(ids), str)


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [LLAMA_3, GPT_2, O200K, r"\A(?!\z|\s*<\|a\|>|<b>\z)", "a++b", "a*?"])
def test_accepted_patterns(pattern: str) -> None:
    check_regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|b)*", "(?:a|a){9}", "a*a*a*", "(?:a*|b)(?:a*|b)a*", "(?:(?:a*)|b){3}", "a{1000}", r"(a)\1", "[[a]b]",
     "(?<=a)b", "(?R)", "a{1,3}+", "**", "((", "[", "x" * 200_000],
    ids=lambda pattern: pattern[:20],
)  # fmt: skip
def test_refused_patterns(pattern: str) -> None:
    content = json.loads(tokenizer_json(LLAMA))
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    with pytest.raises(ValueError, match=r"regular expression|tokenizers"):
        build_tokenizer(content)


def test_export_names_bad_tokenizer(tmp_path: Path, contents: dict[str, str]) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes((LLAMA / "tokenizer_config.json").read_bytes())
    content = json.loads(contents["llama"])
    content["model"]["vocab"]["3"] = 2_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FusionError, match=r"tokenizer.json cannot be loaded .* '3' has the id 2000000000"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["model"].update(continuing_subword_prefix="0"), "continuing_subword_prefix"),
        (lambda c: c["model"]["vocab"].update(x=2_000_000_000), "has the id 2000000000"),
        (lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "'Precompiled'"),
        (lambda c: c.update(padding={"strategy": {"Fixed": 10**12}}), "padding"),
    ],
)
def test_bad_tokenizer_in_bundle_with_correct_checksum(
    tiny_bundle: Path, tmp_path: Path, refused: Callable[..., str], change: Change, named: str
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    [entry] = [entry for entry in manifest["files"] if entry["path"] == "tokenizer.json"]
    path = folder / "tokenizer.json"
    entry |= {"size": path.stat().st_size, "sha256": digest(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    message = refused(cli_run.main, folder, "--image", tmp_path / "image.png", "--ask=What?", "--threads=1")
    assert "tokenizer.json cannot be loaded as a tokenizer" in message
    assert named in message


@pytest.mark.parametrize(
    "model",
    [bytes(4 << 20), b"\x08\x00" * (2 << 20), b"\x0a\x02\x0a\x00" * (1 << 20), b"\x12\x02\x08\x00" * (1 << 20),
     b"\x22\x02\x08\x00" * (1 << 20), bytes(9 << 20), b"\x0a\x80\x80\x80\x02\x0a\xfb\xff\xff\x01" + b"a" * (4 << 20)],
    ids=lambda model: repr(model[:8]),
)  # fmt: skip
def test_empty_sentencepiece_models(tmp_path: Path, model: bytes) -> None:
    write_phi(tmp_path, model)
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FusionError, match=r"tokenizer\.model"):
        tokenizer_json(tmp_path)
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_duplicate_json_keys(contents: dict[str, str]) -> None:
    """The library might read the value that is not checked."""
    content = contents["phi"].replace('"type":"BPE"', '"type":"BPE","dropout":0.5', 1).encode()
    with pytest.raises(ValueError, match="'dropout' is a duplicate key"):
        parse_tokenizer(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].update(unk_token="nowhere", byte_fallback=False),
        lambda c: c.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
    ],
)
def test_tokenizer_fails_on_a_text(contents: dict[str, str], change: Change) -> None:
    """The second change makes the library panic: Phi's normalizer matches an empty text."""
    content = json.loads(contents["phi"])
    change(content)
    encoder = PromptEncoder(build_tokenizer(content), TEMPLATES["phi_3"])
    with pytest.raises(FusionError, match=r"The bundle's tokenizer fails on this text \(tokenizers .*; export"):
        encoder.encode([], "\U0001f916 <|end|> x")
