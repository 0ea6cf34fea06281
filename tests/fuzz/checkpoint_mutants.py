"""Mutate checkpoints: configs, indices, safetensors headers and tensors, float and in three prequantized layouts."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

from support.checkpoints import TINY, write_checkpoint
from support.paths import GOLDEN

from fusion_edge.export import cli
from fuzz.judge import GROWTH, OUTPUT, SECONDS, Mutant
from fuzz.mutations import mutate_bytes, mutate_json, read, replace, to_json_bytes, tried, value

LLAMA = GOLDEN / "FUSION-X-tiny-LLaMA"
PREQUANTIZED = ("gptq-v1-sym", "gptq-v2-asym-desc-act", "ct-asym-group", "ct-actorder", "bnb-nf4-nested")
DTYPES = ("F16", "BF16", "F32", "F64", "U8", "I8", "I32", "I64", "BOOL", "F8_E4M3", "f16", "", 16, None)
PRECISIONS = ("--int4", "--int8", "--fp16", "--fp32", "--nf4")
ONES = [1.0] * 8
FOURS = [4.0] * 8
ROTARY: tuple[dict[str, Any], ...] = (
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": ONES, "long_factor": FOURS}},
    {"rope_parameters": None},
    {"rope_scaling": {"type": "su", "short_factor": ONES, "long_factor": FOURS}},
    {"rope_scaling": {"type": "longrope", "short_factor": ONES, "long_factor": FOURS, "attention_factor": 2.0}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1}},
    {"rope_scaling": {"rope_type": "linear", "factor": 1e-300}},
    {"rope_scaling": {"rope_type": None}},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192}},
    {"sliding_window": 128},
    {"sliding_window": 128, "use_sliding_window": False},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"partial_rotary_factor": 0.5},
    {"dtype": "bfloat16", "torch_dtype": None},
    {"text_config": {"hidden_size": 32}, "architectures": ["LlavaForConditionalGeneration"]},
    {"quantization_config": {"quant_method": "awq", "bits": 4}},
    {"head_dim": None, "num_key_value_heads": None},
)  # fmt: skip
"""Config fields of several ``transformers`` releases, and others."""


class Checkpoints:
    """See :class:`fuzz.judge.Kind`."""

    share = 18
    batch = 150
    seconds = SECONDS
    growth = GROWTH

    def prepare(self, folder: Path) -> None:
        self.bases = [write_checkpoint(folder / "phi", TINY), Path(shutil.copytree(LLAMA, folder / "llama"))]
        _in_a_child(lambda: _write_prequantized(folder))  # keeps torch out of this process
        self.bases += [folder / name for name in PREQUANTIZED]

    def mutant(self, draw: Random | None, folder: Path) -> Mutant:
        checkpoint, changes = folder / "checkpoint", []
        if draw is None:
            return exported(link(self.bases[0], checkpoint), folder, ["--int4"], ())
        base = draw.choice([*self.bases, *self.bases[:2] * 2])
        link(base, checkpoint)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            changes.append(tried(self._change, draw, checkpoint))
        options = ["--dry-run"] if draw.random() < 0.4 else [draw.choice(PRECISIONS)]
        return exported(checkpoint, folder, options, (base.name, *changes, *options))

    def _change(self, draw: Random, folder: Path) -> str:
        shards = sorted(folder.glob("*.safetensors"))
        what = draw.randrange(20)
        if what <= 6 or not shards:
            return _config(draw, folder / "config.json")
        if what == 7:
            return _json(draw, folder / "generation_config.json")
        if what == 8 and (folder / "model.safetensors.index.json").is_file():
            return _json(draw, folder / "model.safetensors.index.json")
        if what <= 14:
            return _header(draw, draw.choice(shards))
        if what <= 16:
            return _tensors(draw, draw.choice(shards))
        return change_file(draw, draw.choice(sorted(folder.iterdir())))


def link(base: Path, folder: Path) -> Path:
    """Copy a folder with hard links to its files."""
    shutil.copytree(base, folder, copy_function=os.link)
    return folder


def exported(checkpoint: Path, folder: Path, options: list[str], changes: tuple[str, ...]) -> Mutant:
    """Run ``fusion-export`` on a checkpoint."""
    arguments = [str(checkpoint), "-o", str(folder / OUTPUT / "bundle"), *options]
    return Mutant(changes, lambda: cli.main(arguments), frozenset({"bundle"}))


def change_file(draw: Random, path: Path) -> str:
    """Damage a file, or put something else in its place."""
    content = read(path)
    what = draw.randrange(12)
    if what == 0:
        path.unlink()
        return f"{path.name} missing"
    if what == 1:
        path.unlink()
        path.mkdir()
        return f"{path.name} a folder"
    if what == 2:
        path.unlink()
        path.symlink_to(draw.choice(["/dev/null", "/dev/zero", path.name, "missing", "/proc/self/mem", "config.json"]))
        return f"{path.name} a link to {path.readlink()}"
    if what == 3:
        path.rename(path.with_name(draw.choice(["x.safetensors", "model.safetensors", "config.json", "x.json"])))
        return f"{path.name} renamed"
    content, change = mutate_bytes(draw, content)
    replace(path, content)
    return f"{path.name}: {change}"


def _config(draw: Random, path: Path) -> str:
    config = json.loads(read(path))
    if not isinstance(config, dict) or draw.random() < 0.6:
        return _json(draw, path)
    if draw.random() < 0.5:
        fields = draw.choice(ROTARY)
        config |= fields
    else:
        fields = {draw.choice([*config, "rope_parameters", "head_dim", "sliding_window"]): value(draw)}
        config |= fields
    content, change = to_json_bytes(draw, config)
    replace(path, content)
    return f"config.json with {repr(fields)[:80]}{change}"


def _json(draw: Random, path: Path) -> str:
    tree, change = mutate_json(draw, json.loads(read(path)))
    content, written = to_json_bytes(draw, tree)
    replace(path, content)
    return f"{path.name}{change}{written}"


def _split(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Return header and tensors of a safetensors file. None if it is no longer valid."""
    try:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
    except (ValueError, struct.error, OverflowError):
        return None
    return (header, content[8 + size :]) if isinstance(header, dict) else None


def _header(draw: Random, path: Path) -> str:
    """Change a tensor's entry, the header's length, or the header's text."""
    parts = _split(read(path))
    if parts is None:
        return "nothing"
    header, tensors = parts
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "shape" in entry]
    if not names:
        return "nothing"
    name = draw.choice(names)
    entry = header[name]
    what = draw.randrange(9)
    change = ""
    if what == 0:
        entry["dtype"] = draw.choice(DTYPES)
    elif what == 1 and isinstance(entry["shape"], list):
        entry["shape"] = draw.choice(
            [entry["shape"][::-1], [], [0], [2**62, 4], [-1], [1, *entry["shape"]], [1.0], None]
        )
    elif what == 2:
        other = header[draw.choice(names)]
        entry["data_offsets"] = draw.choice(
            [[0, 0], [-1, 4], [0, 2**63], [4, 0], other.get("data_offsets"), [0], "0,4"]
        )
    elif what == 3:
        new = draw.choice(["", f"module.{name}", f"{name}_scale", "model.layers.0.self_attn.rotary_emb.inv_freq", "\0"])
        header[new] = header.pop(name)
        change = f" renamed {new!r}"
    elif what == 4:
        del header[name]
        change = " removed"
    elif what == 5:
        header["__metadata__"] = draw.choice([None, {"format": "pt"}, {"x": 1}, [], "x", {"x": "y" * 1000}])
        name, change = "__metadata__", f" = {repr(header['__metadata__'])[:30]}"
    elif what == 6:
        header, tree_change = mutate_json(draw, header)
        name, change = "", tree_change
    content, written = to_json_bytes(draw, header)
    length = len(content)
    if what == 7:
        length = draw.choice([0, 1, length - 1, length + 1, 99_999_999, 100_000_001, 2**32, 2**63, 2**64 - 1])
        change = f" length {length}"
    elif what == 8:
        content, change = mutate_bytes(draw, content)
        length = len(content)
    replace(path, struct.pack("<Q", length) + content + tensors)
    return f"{path.name} header {name}{change or f' = {repr(entry)[:80]}'}{written}"


def _tensors(draw: Random, path: Path) -> str:
    """Change values of a tensor: not finite, huge, random, or an integer's limits."""
    content = read(path)
    parts = _split(content)
    if parts is None:
        return "nothing"
    header, tensors = parts
    placed = {n: e["data_offsets"] for n, e in header.items() if isinstance(e, dict) and "data_offsets" in e}
    placed = {n: o for n, o in placed.items() if isinstance(o, list) and len(o) == 2 and all(type(i) is int for i in o)}
    if not placed:
        return "nothing"
    name = draw.choice(sorted(placed))
    start, stop = (max(0, min(offset, len(tensors))) for offset in placed[name])
    pattern = draw.choice(
        [b"\xff", b"\0", b"\x7f", b"\0\x7c", b"\xff\x7b", b"\0\xfc", b"\x01\0", b"\x80\x7f", b"\0\0\x80\x7f"]
    )
    count = draw.choice([1, 2, 16, max(stop - start, 0)])
    filled = (pattern * (count // len(pattern) + 1))[: max(0, min(stop - start, max(count, len(pattern))))]
    changed = tensors[:start] + filled + tensors[start + len(filled) :]
    replace(path, content[: len(content) - len(tensors)] + changed)
    return f"{name}: {len(filled)} bytes of {pattern.hex()}"


def _in_a_child(work: Any) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("The prequantized checkpoints could not be written.")


def _write_prequantized(folder: Path) -> None:
    from support.prequantized_checkpoints import packer, read_fixture, write_quantized

    for name in PREQUANTIZED:
        fixture = read_fixture(name)
        write_quantized(folder / name, fixture.config, fixture.tensors, packer(name))
