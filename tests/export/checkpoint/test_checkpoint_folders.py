"""Unusual checkpoint folders: read if nothing is lost, else refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fusion_edge.export import cli
from fusion_edge.export.checkpoint.hub import resolve_checkpoint
from fusion_edge.export.checkpoint.input_files import LARGEST_JSON
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import POSITION_IDS
from fusion_edge.export.checkpoint.wrapper_prefixes import strip_wrappers
from fusion_edge.runtime.errors import FusionError

Tensors = dict[str, npt.NDArray[Any]]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 5530288\n".encode()
QKV = "model.layers.0.self_attn.qkv_proj"
JSON_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", INDEX]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy to change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "FUSION-changed")


@pytest.fixture
def refuse(checkpoint: Path, refused: Callable[..., str]) -> Callable[..., str]:
    """Return ``refuse()``, which returns the error for ``checkpoint``."""

    def run(source: Path = checkpoint) -> str:
        return refused(cli.main, source, "--dry-run")

    return run


def accepted(checkpoint: Path) -> None:
    assert cli.main([str(checkpoint), "--dry-run"]) == 0


def tensors_of(checkpoint: Path) -> Tensors:
    return load_file(checkpoint / FIRST) | load_file(checkpoint / SECOND)


def replace_tensors(checkpoint: Path, tensors: Tensors) -> None:
    """Replace both shards and the index by one file."""
    for name in (FIRST, SECOND, INDEX):
        (checkpoint / name).unlink()
    save_file(tensors, checkpoint / "model.safetensors")


# Files of other formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*JSON_FILES, FIRST, "tokenizer.model"])
def test_git_lfs_pointer(checkpoint: Path, refuse: Callable[..., str], name: str) -> None:
    (checkpoint / name).write_bytes(LFS)
    assert f"{checkpoint / name} is a Git LFS pointer" in (message := refuse())
    assert "`git lfs pull`" in message


@pytest.mark.parametrize("name", [*JSON_FILES, FIRST])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>Not Found</html>", "is a web page"),
        (b"\xef\xbb\xbf\n <HTML><body>", "is a web page"),
        (b"PK\x03\x04" + bytes(60), "is a zip archive"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(60), "is a pickle"),
        (b"GGUF\x03" + bytes(60), "is a GGUF file"),
    ],
)
def test_file_of_another_format(
    checkpoint: Path, refuse: Callable[..., str], name: str, content: bytes, what: str
) -> None:
    (checkpoint / name).write_bytes(content)
    assert f"{checkpoint / name} {what}" in refuse()


def test_torch_save_file(checkpoint: Path, refuse: Callable[..., str]) -> None:
    torch.save({"a": torch.zeros(3)}, checkpoint / FIRST)
    assert "is a zip archive, perhaps of torch.save" in refuse()
    torch.save({"a": torch.zeros(3)}, checkpoint / FIRST, _use_new_zipfile_serialization=False)
    assert "is a pickle, which can run code" in refuse()


@pytest.mark.parametrize("name", [*JSON_FILES, FIRST, "tokenizer.model"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_not_a_regular_file(checkpoint: Path, refuse: Callable[..., str], name: str, kind: str) -> None:
    (checkpoint / name).unlink()
    if kind == "pipe":
        os.mkfifo(checkpoint / name)
    elif kind == "device":
        (checkpoint / name).symlink_to("/dev/zero")
    else:
        (checkpoint / name).mkdir()
    assert f"{checkpoint / name} is a folder, pipe or device; expected a regular file" in refuse()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_encodings(checkpoint: Path, name: str, encoding: str) -> None:
    text = (checkpoint / name).read_text(encoding="utf-8")
    (checkpoint / name).write_bytes(text.encode(encoding))
    accepted(checkpoint)


# Sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_too_large(checkpoint: Path, refuse: Callable[..., str], name: str) -> None:
    (checkpoint / name).write_bytes(b'{"a":' + b"[" * LARGEST_JSON)
    assert f"is too large; expected at most {LARGEST_JSON} bytes" in refuse()


@pytest.mark.parametrize("inner", [b"[],", b"{},", b"[[[[]]]],"])
def test_largest_json_memory(tmp_path: Path, inner: bytes) -> None:
    content = b'{"a":[' + inner * (LARGEST_JSON // len(inner) - 8) + b"0]}"
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint\n"
        "from fusion_edge.export.checkpoint.input_files import read_json_object\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_json_object(Path('config.json'))\n"
        "try:\n    Checkpoint(Path('.'))\n"
        "except Exception as error:\n    assert 'corrupt safetensors header' in str(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10  # KiB


def test_oversized_header(checkpoint: Path, refuse: Callable[..., str]) -> None:
    with (checkpoint / FIRST).open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000))
        file.truncate(100_000_000)  # sparse
    started = time.process_time()
    assert "bytes, the limit" in refuse()
    assert time.process_time() - started < 2


def test_long_value_is_shortened(checkpoint: Path, refuse: Callable[..., str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"query_len": "1" * 100_000}), encoding="utf-8")
    assert len(refuse()) < 1000


# Folders without a checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_lora_adapter(tmp_path: Path, refuse: Callable[..., str], name: str) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / name).write_bytes(b"{}")
    message = refuse(folder)
    assert f"holds a LoRA adapter ({name})" in message
    assert "merge it" in message


def test_lora_adapter_beside_base_model(checkpoint: Path, refuse: Callable[..., str]) -> None:
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")
    assert "holds a LoRA adapter (adapter_model.safetensors)" in refuse()


@pytest.mark.parametrize("name", [f"{QKV}.lora_A.weight", f"{QKV}.base_layer.weight"])
def test_lora_tensors_inside_checkpoint(checkpoint: Path, refuse: Callable[..., str], name: str) -> None:
    replace_tensors(checkpoint, tensors_of(checkpoint) | {name: np.ones(3, np.float16)})
    assert f"Tensor {name} of {checkpoint} belongs to a LoRA adapter: merge it" in refuse()


def test_deepspeed_checkpoint(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "zero_to_fp32.py").write_bytes(b"")
    assert "is a sharded DeepSpeed checkpoint" in refuse(tmp_path)


def test_weight_file_of_another_name(checkpoint: Path, refuse: Callable[..., str]) -> None:
    replace_tensors(checkpoint, tensors_of(checkpoint))
    (checkpoint / "model.safetensors").rename(checkpoint / "model.fp16.safetensors")
    assert "has safetensors files of other names (model.fp16.safetensors)" in refuse()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model_type": "phi3"}, ", a language model"),
        ({"model_type": "llama"}, ", a language model"),
        ({"model_type": "llava", "vision_config": {}}, ", another vision-language model"),
        ({"model_type": "qwen2_vl", "vision_start_token_id": 1}, ", another vision-language model"),
        ({"model_type": "llava_llama", "mm_vision_tower": "x"}, ", another vision-language model"),
        ({"model_type": "phi3_v", "img_processor": {}}, ", another vision-language model"),
        ({}, ""),
    ],
)
def test_checkpoint_of_another_model(
    checkpoint: Path, refuse: Callable[..., str], fields: dict[str, object], kind: str
) -> None:
    (checkpoint / "config.json").write_text(json.dumps(fields | {"hidden_size": 64}), encoding="utf-8")
    expected = f"its model_type is {fields.get('model_type')!r}{kind}; expected 'fusion_phi' or 'fusion_llama'."
    assert expected in refuse()


def test_bundle_instead_of_checkpoint(tiny_bundle: Path, refuse: Callable[..., str]) -> None:
    assert f"{tiny_bundle} is a bundle that fusion-export wrote; expected a checkpoint." in refuse(tiny_bundle)


# The hub's cache --------------------------------------------------------------------------------------------


def repository(folder: Path, main: str | None, *snapshots: str) -> Path:
    root = folder / "models--org--name"
    for snapshot in snapshots:
        (root / "snapshots" / snapshot).mkdir(parents=True)
    (root / "snapshots").mkdir(parents=True, exist_ok=True)
    if main is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main, encoding="utf-8")
    return root


@pytest.mark.parametrize(("main", "snapshots"), [("b", "abc"), ("b\n", "ab"), (None, "b"), ("gone", "b")])
def test_hub_cache_repository(tmp_path: Path, main: str | None, snapshots: str) -> None:
    root = repository(tmp_path, main, *snapshots)
    for source in (root, root / "snapshots"):
        assert resolve_checkpoint(str(source), None) == root / "snapshots" / "b"
    assert resolve_checkpoint(str(root / "snapshots" / "b"), None) == root / "snapshots" / "b"


@pytest.mark.parametrize(("main", "snapshots"), [(None, "ab"), ("../../b", "ab"), ("a", "")])
def test_hub_cache_repository_without_main_snapshot(tmp_path: Path, main: str | None, snapshots: str) -> None:
    root = repository(tmp_path, main, *snapshots)
    with pytest.raises(FusionError, match=rf"hub's cache with {len(snapshots)} snapshots, .* a folder of snapshots/"):
        resolve_checkpoint(str(root), None)


# Shards without an index ------------------------------------------------------------------------------------


def test_numbered_shards_need_no_index(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as indexed:
        names = indexed.tensors.keys()
    (checkpoint / INDEX).unlink()
    with Checkpoint(checkpoint) as opened:
        assert opened.tensors.keys() == names


@pytest.mark.parametrize("missing", [FIRST, SECOND])
def test_missing_shard_without_index(checkpoint: Path, refuse: Callable[..., str], missing: str) -> None:
    (checkpoint / INDEX).unlink()
    (checkpoint / missing).unlink()
    assert f"The shard {missing} is missing from {checkpoint}" in refuse()


def test_tensor_in_two_shards(checkpoint: Path, refuse: Callable[..., str]) -> None:
    (checkpoint / INDEX).unlink()
    shutil.copyfile(checkpoint / FIRST, checkpoint / SECOND)
    assert f"is in both {checkpoint / FIRST} and {checkpoint / SECOND}" in refuse()


# Names of tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_wrapped_model(checkpoint: Path, prefix: str) -> None:
    with Checkpoint(checkpoint) as opened:
        expected = opened.read(f"{QKV}.weight")
    replace_tensors(checkpoint, {f"{prefix}{name}": value for name, value in tensors_of(checkpoint).items()})
    with Checkpoint(checkpoint) as opened:
        assert np.array_equal(opened.read(f"{QKV}.weight"), expected)
    accepted(checkpoint)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("model.layers.0._orig_mod.mlp.weight", "model.layers.0.mlp.weight"),
        ("_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp", "model.layers.0.mlp"),
        ("model.not_orig_mod.weight", "model.not_orig_mod.weight"),
        ("module.model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_strip_wrapper_names(stored: str, read: str) -> None:
    assert strip_wrappers({stored: 1}) == {read: 1}


@pytest.mark.parametrize(
    "names", [("a._orig_mod.b", "a.b"), ("model.embed_tokens.weight", "module.model.embed_tokens.weight"), ()]
)
def test_names_without_wrapper_stay(names: tuple[str, ...]) -> None:
    assert strip_wrappers(dict.fromkeys(names, 1)) == dict.fromkeys(names, 1)


def test_prefix_of_some_tensors_is_kept(checkpoint: Path, refuse: Callable[..., str]) -> None:
    tensors = tensors_of(checkpoint)
    tensors["module.model.norm.weight"] = tensors.pop("model.norm.weight")
    replace_tensors(checkpoint, tensors)
    message = f"Tensor model.norm.weight is missing from {checkpoint}, but there is module.model.norm.weight; expected"
    assert message in refuse()


@pytest.mark.parametrize(
    "extra",
    [
        {POSITION_IDS: np.arange(16)[None]},
        {POSITION_IDS: np.arange(16, dtype=np.int32)},
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)},
        {"model.rotary_emb.inv_freq": np.ones(8, np.float16), "model.rotary_emb.original_inv_freq": np.ones(8, "f4")},
        {f"{QKV}.bias": np.zeros(96, np.float16)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_buffers_and_zero_biases_are_ignored(checkpoint: Path, extra: Tensors) -> None:
    replace_tensors(checkpoint, tensors_of(checkpoint) | extra)
    accepted(checkpoint)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({POSITION_IDS: np.arange(16)[::-1].copy()}, f"Tensor {POSITION_IDS} of"),
        ({POSITION_IDS: np.arange(17)}, "is not 0 to 15 in order"),
        ({"model.layers.0.rotary_emb.other": np.ones(8, np.float32)}, "is not part of a FUSION model"),
        ({f"{QKV}.bias": np.full(96, 1e-7, np.float16)}, f"Tensor {QKV}.bias of"),
        ({f"{QKV}.bias": np.full(96, np.nan, np.float16)}, "is a bias that is not 0"),
        ({"model.layers.9.self_attn.qkv_proj.bias": np.zeros(96, np.float16)}, "is not part of a FUSION model"),
    ],
)
def test_unused_tensors_with_values_are_refused(
    checkpoint: Path, refuse: Callable[..., str], extra: Tensors, message: str
) -> None:
    replace_tensors(checkpoint, tensors_of(checkpoint) | extra)
    assert message in refuse()


# Paths ------------------------------------------------------------------------------------------------------


def test_path_not_utf_8(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9")
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / name)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "bundle")]) == 0
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["source"] == "caf\N{REPLACEMENT CHARACTER}"
    (checkpoint / "config.json").write_bytes(b"")
    command = [sys.executable, "-m", "fusion_edge.export.cli", str(checkpoint), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert r"caf\udce9/config.json is not valid JSON" in done.stderr
