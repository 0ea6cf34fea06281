"""Mutate tokenizer files: SentencePiece models by field, tokenizer.json and settings by value."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from support.checkpoints import TINY, write_checkpoint
from support.tokenizer_files import varint
from tokenizers import Tokenizer

from fusion_edge.export import cli
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.prompts.prompt import encode_prompt
from fuzz.checkpoint_mutants import LLAMA, change_file, exported, link
from fuzz.judge import GROWTH, SECONDS, Mutant
from fuzz.mutations import NUMBERS, TEXTS, Json, mutate_bytes, mutate_json, read, replace, to_json_bytes, tried, value

TOKENS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
SETTINGS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens", "bos_token", "cls_token",
    "eos_token",
    "extra_special_tokens", "legacy", "mask_token", "model_max_length", "pad_token", "sep_token", "tokenizer_class",
    "unk_token",
)  # fmt: skip
CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "GPT2Tokenizer",
    None,
)
HUGE = (2**32, 2**31, 2_000_000_000, 2**64, -1, 10**9)


class Tokenizers:
    """See :class:`fuzz.judge.Kind`."""

    share = 12
    batch = 150
    seconds = SECONDS
    growth = GROWTH

    def prepare(self, folder: Path) -> None:
        both = write_checkpoint(folder / "both", TINY)
        shutil.copyfile(LLAMA / "tokenizer.json", both / "tokenizer.json")
        self.bases = [write_checkpoint(folder / "phi", TINY), Path(shutil.copytree(LLAMA, folder / "llama")), both]

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        checkpoint = folder / "checkpoint"
        if draw is None:
            return _asked(link(self.bases[0], checkpoint))
        base = draw.choice(self.bases)
        link(base, checkpoint)
        changes = [base.name, *(tried(_change, draw, checkpoint) for _ in range(draw.choice([1, 1, 1, 2, 3])))]
        if draw.random() < 0.1:
            return exported(checkpoint, folder, ["--int4"], (*changes, "exported"))
        return _asked(checkpoint, tuple(changes))


def _asked(checkpoint: Path, changes: tuple[str, ...] = ()) -> Mutant:
    """Run ``fusion-export --dry-run``, and tokenize a prompt with the result."""

    def run() -> int:
        code = cli.main([str(checkpoint), "--dry-run"])
        if code == 0:
            tokenizer = Tokenizer.from_str(tokenizer_json(checkpoint))
            encode_prompt(tokenizer, TEMPLATES["phi_3"], [], "What is it?<|end|> é 😀")
            tokenizer.decode(list(range(0, tokenizer.get_vocab_size(), 7)))
        return code

    return Mutant(changes, run)


def _change(draw: Random, folder: Path) -> str:
    model, big = folder / "tokenizer.model", folder / "tokenizer.json"
    what = draw.randrange(12)
    if what <= 3 and model.is_file():
        content, change = mutate_model(draw, read(model))
        replace(model, content)
        return f"tokenizer.model: {change}"
    if what <= 6 and big.is_file():
        return edit_tokenizer_json(draw, big)
    if what <= 9:
        return _settings(draw, folder / draw.choice([*TOKENS, *TOKENS[2:] * 4]))
    return change_file(draw, draw.choice(sorted(folder.glob("*token*"))))


def _settings(draw: Random, path: Path) -> str:
    """Change a setting, or the file anywhere."""
    if not os.path.lexists(path):
        path.write_text("{}", encoding="utf-8")
    tree = json.loads(read(path))
    decoder = tree.get("added_tokens_decoder") if isinstance(tree, dict) else None
    what = draw.randrange(4)
    if what == 0 and isinstance(tree, dict):
        name = draw.choice(SETTINGS)
        tree[name] = draw.choice(CLASSES) if name == "tokenizer_class" else value(draw)
        change = f".{name} = {repr(tree[name])[:60]}"
    elif what == 1 and isinstance(decoder, dict) and decoder:
        key = draw.choice(sorted(decoder))
        new = str(draw.choice([*HUGE, int(key) + 1 if key.isdecimal() else 0, "x", "", "1_0", "²", "9" * 5000]))
        decoder[new] = decoder.pop(key)
        change = f".added_tokens_decoder: {key} is {new[:20]}"
    else:
        tree, change = mutate_json(draw, tree)
    content, written = to_json_bytes(draw, tree)
    replace(path, content)
    return f"{path.name}{change}{written}"


def edit_tokenizer_json(draw: Random, path: Path) -> str:
    """Change the model, added tokens, normalizer or decoder of a ``tokenizer.json``."""
    tree = json.loads(read(path))
    if not isinstance(tree, dict):
        return "nothing"
    model = tree.get("model")
    what = draw.randrange(10)
    change = ""
    if what == 0 and isinstance(model, dict) and isinstance(model.get("vocab"), dict) and model["vocab"]:
        token = draw.choice(sorted(model["vocab"]))
        model["vocab"][token] = draw.choice([*HUGE, *NUMBERS])
        change = f".model.vocab[{token!r}] = {model['vocab'][token]}"
    elif what == 1 and isinstance(tree.get("added_tokens"), list) and tree["added_tokens"]:
        entry = draw.choice(tree["added_tokens"])
        if isinstance(entry, dict):
            field = draw.choice(["id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"])
            entry[field] = draw.choice(HUGE) if field == "id" else draw.choice([*TEXTS, True, False, None])
            change = f".added_tokens {field} = {entry[field]!r}"
    elif what == 2 and isinstance(model, dict):
        model["type"] = draw.choice(["BPE", "WordPiece", "WordLevel", "Unigram", None, "x"])
        change = f".model.type = {model['type']}"
    elif what <= 5:
        part = draw.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"])
        tree[part] = draw.choice(_PARTS)
        change = f".{part} = {repr(tree[part])[:80]}"
    elif what == 6 and isinstance(model, dict) and isinstance(model.get("merges"), list):
        rule: Json = draw.choice([["a"], "a", "a b c", ["", ""], ["x", "y"], ["a", "b", "c"], 3])
        model["merges"].insert(0, rule)
        change = f".model.merges: {rule!r} first"
    if not change:
        tree, change = mutate_json(draw, tree)
    content, written = to_json_bytes(draw, tree)
    replace(path, content)
    return f"{path.name}{change}{written}"[:300]


_PARTS: tuple[Any, ...] = (
    None,
    {"type": "Sequence", "normalizers": []},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"},
    {"type": "Prepend", "prepend": "x" * 100_000},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Split", "pattern": {"Regex": "(?:a|a?)+"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": True},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [],
     "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50, "pair": [],
     "special_tokens": {}},
    {"type": "BertProcessing", "sep": ["[SEP]", 2**31], "cls": ["[CLS]", 2**31]},
    {"type": "Strip", "content": " ", "start": 2**31, "stop": 2**40},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "ByteFallback"},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 3},
    {"direction": "Left", "max_length": 2**40, "strategy": "OnlySecond", "stride": 2**40},
    {"strategy": {"Fixed": 2**33}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
     "pad_token": "x"},
    {"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0,
     "pad_token": "x"},
)  # fmt: skip


def mutate_model(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Change, remove or repeat a field of a SentencePiece model or of a message in it."""
    what = draw.randrange(8)
    if what == 0:
        return bytes(draw.choice([1, 1000, 1 << 20, 8 << 20])), "zeros"
    if what == 1:
        return b"\x0a\x00" * draw.choice([1, 10_000, 300_000]), "empty pieces"
    if what == 2 or not (fields := split_message(content)):
        return mutate_bytes(draw, content)
    index = draw.randrange(len(fields)) if draw.random() < 0.6 else draw.randrange(max(0, len(fields) - 3), len(fields))
    field = fields[index]
    if what == 3:
        fields[index] = draw.choice([b"", field * 2, field * 5000])
        return b"".join(fields), f"field {index} {len(fields[index])} bytes"
    tag_size = 1
    inner = split_message(field[tag_size + 1 :]) if len(field) < 130 else []
    if inner and what >= 5:
        at = draw.randrange(len(inner))
        inner[at], change = mutate_bytes(draw, inner[at])
        body = b"".join(inner)
        fields[index] = field[:1] + varint(len(body)) + body
        return b"".join(fields), f"field {index}.{at}: {change}"
    fields[index], change = mutate_bytes(draw, field)
    return b"".join(fields), f"field {index}: {change}"


def split_message(content: bytes) -> list[bytes]:
    """Return the fields of a protocol buffer, tags included. Empty if it is not one, or has groups."""

    def number(at: int) -> tuple[int, int]:
        result = shift = 0
        while True:
            byte = content[at]
            result |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return result, at

    fields, at = [], 0
    try:
        while at < len(content):
            tag, end = number(at)
            if tag & 7 == 0:
                _, end = number(end)
            elif tag & 7 == 2:
                size, end = number(end)
                end += size
            else:
                end += {1: 8, 5: 4}[tag & 7]
            if end > len(content):
                return []
            fields.append(content[at:end])
            at = end
    except (IndexError, KeyError):
        return []
    return fields
