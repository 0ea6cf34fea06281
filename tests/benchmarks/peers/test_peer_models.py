"""Export of a checkpoint's LLM for other engines. GGUF files need llama.cpp's packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.paths import GOLDEN

from fusion_edge.benchmarks.peers.export_llm import main, write_bfloat16
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint

PHI = GOLDEN / "FUSION-tiny-Phi"


def test_hugging_face_folder_has_the_llm_only(tmp_path: Path) -> None:
    output = tmp_path / "phi"
    assert main(["hugging-face", str(PHI), "-o", str(output)]) == 0
    config = json.loads((output / "config.json").read_text())
    source = json.loads((PHI / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("phi3", ["Phi3ForCausalLM"])
    assert config["rope_scaling"] == source["rope_scaling"]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    names = index["weight_map"]
    layers = config["num_hidden_layers"]
    assert len(names) == 6 * layers + 3
    assert not [name for name in names if "vision" in name or "projector" in name]
    assert {"lm_head.weight", "model.norm.weight", f"model.layers.{layers - 1}.mlp.gate_up_proj.weight"} <= names.keys()
    assert all((output / shard).is_symlink() for shard in names.values())
    with Checkpoint(PHI) as checkpoint:
        assert index["metadata"]["total_size"] == sum(checkpoint.tensors[name].nbytes for name in names)


@pytest.mark.parametrize("command", ["hugging-face", "gguf"])
def test_other_checkpoints_are_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, message in (
        (GOLDEN / "FUSION-X-tiny-LLaMA", "has a Llama LLM; expected a FUSION-Phi"),
        (tmp_path, "error"),
    ):
        assert main([command, str(source), "-o", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **names: object) -> None:
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("missing", ["gguf", "llama_cpp"])
def test_packages_that_are_missing_are_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gguf", "llama_cpp"):
        fake_module(monkeypatch, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["gguf", str(PHI), "-o", str(tmp_path / "out")]) == 1
    package = {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}[missing]
    assert f"pip install {package}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gguf", "llama_cpp"):
        fake_module(monkeypatch, name)
    assert main(["gguf", str(PHI), "-o", str(tmp_path / "out"), "--format", "Q3_X"]) == 2
    assert "has no format Q3_X" in capsys.readouterr().err


def test_a_gguf_file_in_bfloat16_needs_no_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["gguf", str(PHI), "-o", str(tmp_path / "out"), "--format", "BF16"]) == 0
    fields = gguf.GGUFReader(tmp_path / "out/BF16.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    added = json.loads((PHI / "added_tokens.json").read_text())
    assert len(tokens) == len(kinds) == json.loads((PHI / "config.json").read_text())["vocab_size"]
    assert {token: tokens.index(token) for token in added} == added
    assert {kinds[i] for i in added.values()} == {gguf.TokenType.CONTROL}
    assert (tokens[0], kinds[0]) == ("<unk>", gguf.TokenType.UNKNOWN)
    assert kinds[tokens.index("<0x0A>")] == gguf.TokenType.BYTE


def test_a_gguf_file_holds_the_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "BF16.gguf"
    with Checkpoint(PHI) as checkpoint:
        write_bfloat16(gguf, checkpoint, read_config(checkpoint).language, path)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for ours, theirs in (
            ("lm_head.weight", "output.weight"),
            ("model.layers.1.self_attn.qkv_proj.weight", "blk.1.attn_qkv.weight"),
            ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ):
            values = gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            np.testing.assert_array_equal(values, checkpoint.read(ours))
