"""Random checkpoints of released sizes are valid for the safetensors package and the exporter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fusion_edge.benchmarks import full_size_checkpoint
from fusion_edge.benchmarks.full_size_checkpoint import GOLDEN, LAYOUTS, ModelSizes, write_checkpoint
from fusion_edge.export import cli
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tokenizer import tokenizer_json
from fusion_edge.runtime.bundle.config import VisionConfig
from fusion_edge.runtime.errors import FusionError


def small(name: str) -> ModelSizes:
    """Return a released layout with small sizes."""
    layout = LAYOUTS[name]
    vision = dataclasses.replace(layout.vision, width=32, layers=3, mlp_width=48)
    return dataclasses.replace(
        layout,
        tower="siglip-small",
        vision=vision,
        hidden_size=64,
        layers=5,
        heads=4,
        kv_heads=4 if layout.kv_heads == layout.heads else 2,
        mlp_width=96,
        vocab_size=1300,
    )


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors and check that each is in the shard of the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, "pt") as file:
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_exporter_accepts_every_layout(tmp_path: Path, name: str) -> None:
    layout = small(name)
    write_checkpoint(layout, tmp_path, GOLDEN / layout.like)
    with Checkpoint(tmp_path) as checkpoint:
        config = read_config(checkpoint)
        match_parameters(checkpoint, config)
    assert config.vision == layout.vision
    assert config.language.layers == 5
    assert config.alignment.layers == 2  # after LLM layers 0 and 3
    assert tokenizer_json(tmp_path)


def test_shards_hold_the_declared_tensors(tmp_path: Path) -> None:
    layout = small("3b")
    write_checkpoint(layout, tmp_path, GOLDEN / layout.like, shard_bytes=60_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = read(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layout.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_values_resemble_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size_checkpoint, "POOL", 1000)  # matrices need several pieces
    write_checkpoint(small("3b"), tmp_path, GOLDEN / "FUSION-tiny-Phi")
    tensors = read(tmp_path)
    matrix = tensors["model.layers.0.mlp.gate_up_proj.weight"].float()
    assert abs(matrix.mean()) < 0.005
    assert matrix.std() == pytest.approx(0.02, rel=0.1)
    norm = tensors["model.norm.weight"].float()
    assert norm.mean() == pytest.approx(1, abs=0.02)
    assert not torch.equal(tensors["model.layers.1.mlp.gate_up_proj.weight"].float(), matrix)


def test_seed_determines_the_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(small("x-8b"), tmp_path / folder, GOLDEN / "FUSION-X-tiny-LLaMA", seed)
    a, b, c = ((tmp_path / folder / "model-00001-of-00001.safetensors").read_bytes() for folder in "abc")
    assert a == b
    assert a != c


def test_sparse_checkpoint_occupies_no_disk_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layout", "8b", "--sparse", "--output", str(tmp_path / "8b")]
    assert full_size_checkpoint.main(arguments) == 0
    files = list((tmp_path / "8b").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 19_900_000_000
    assert sum(512 * file.stat().st_blocks for file in files) < 1_000_000
    assert cli.main([str(tmp_path / "8b"), "--target", "jetson-orin", "--dry-run"]) == 0
    assert "It fits in 28.00 GB" in capsys.readouterr().out


def test_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    arguments = ["--layout", "3b", "--layers", "1", "--vocab-size", "1208", "--sparse"]
    assert full_size_checkpoint.main([*arguments, "--output", str(tmp_path)]) == 0
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["lm_head.weight"].shape == (1208, 3072)
        assert read_config(checkpoint).language.vocab_size == 1208


def test_names_are_those_of_the_golden_checkpoint() -> None:
    vision = VisionConfig(width=48, layers=26, mlp_width=80, patch_size=14)
    sizes = ModelSizes("FUSION-tiny-Phi", "siglip", vision, 64, 8, 4, 4, 128, 1208)
    index = json.loads((GOLDEN / "FUSION-tiny-Phi" / "model.safetensors.index.json").read_text())
    assert sizes.tensors().keys() == index["weight_map"].keys()


def test_released_sizes() -> None:
    counts = {
        name: sum(torch.Size(shape).numel() for shape in layout.tensors().values()) / 1e9
        for name, layout in LAYOUTS.items()
    }
    # docs/fusion-model.md: 5.1 B in all for the 3B, of which its tower 0.4 B; the giant tower has 1.1 B.
    assert counts["3b"] == pytest.approx(5.1, abs=0.1)
    assert counts["x-3b"] - counts["3b"] == pytest.approx(0.7, abs=0.05)


def test_occupied_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FusionError, match="not an empty folder"):
        write_checkpoint(small("3b"), tmp_path, GOLDEN / "FUSION-tiny-Phi")
    assert full_size_checkpoint.main(["--layout", "3b", "--layers", "1", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
