"""Bundles of ``fusion-export``, and estimates of ``--dry-run``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.paths import GOLDEN

from fusion_edge.export import cli
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.runtime.bundle.image_memory import image_memory
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info

CHECKPOINTS = ("FUSION-tiny-Phi", "FUSION-X-tiny-LLaMA")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["--int4", "--int8", "--fp16", "--fp32", "--int4 --asym --group-size channel"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_dry_run_knows_the_size(
    checkpoint: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    options = precision.split()
    assert cli.main([str(GOLDEN / checkpoint), *options, "--dry-run", "--json", "--fit", "8GB"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not output.exists()
    assert cli.main([str(GOLDEN / checkpoint), *options, "-o", str(output)]) == 0
    written = files(output)
    assert report["bundle"] == pytest.approx(sum(map(len, written.values())), rel=0.001)
    for name in ("vision_encoder", "alignment_decoder", "llm"):
        assert report["graphs"][name] == len(written[f"{name}.onnx"]) + len(written[f"{name}.data"])
    assert report["fits"] is True
    assert report["peak"] >= report["weights"] + report["key_value_cache"] + report["activations"]


def test_exports_are_reproducible(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / name), "--int4"]) == 0
    assert files(tmp_path / "first") == files(tmp_path / "second")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_an_fp32_bundle_holds_the_checkpoint_values(checkpoint: str, tmp_path: Path) -> None:
    assert cli.main([str(GOLDEN / checkpoint), "-o", str(tmp_path / "bundle"), "--fp32"]) == 0
    stored = BundleWeights(open_bundle(tmp_path / "bundle"))
    with Checkpoint(GOLDEN / checkpoint) as source:
        original = CheckpointWeights(source, match_parameters(source, read_config(source)))
        for name in original.parameters:
            np.testing.assert_array_equal(read_parameter(stored, name), read_parameter(original, name))


def test_every_weight_of_an_int4_bundle_is_quantized(tiny_bundle: Path) -> None:
    weights = open_bundle(tiny_bundle).manifest.weights
    assert {fmt.split(":")[0] for fmt in weights.values()} == {"int4", "int8"}
    assert all(weights[name] == "int4:128" for name in weights if name.startswith("alignment."))
    assert weights["llm.lm_head"] == weights["llm.embed_tokens"] == "int8:128"


def test_options_reach_the_manifest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = "--int8 --group-size 32 --query-len 16,4 --image-tokens 9 --max-context 300 --kv-cache int8"
    rule = ["--rule", "llm.layers.*.mlp.down=fp16"]
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), *options.split(), *rule]) == 0
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.query_lengths == (16, 4)
    assert (manifest.image_side, manifest.max_context, manifest.cache) == (3, 300, "int8")
    assert manifest.weights["llm.layers.1.mlp.down"] == "fp16"
    assert manifest.weights["llm.layers.1.mlp.gate"] == "int8:32"


def test_info_prints_the_manifest(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_info.main([str(tiny_bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("memory") == dataclasses.asdict(image_memory(open_bundle(tiny_bundle).manifest))
    assert printed == json.loads((tiny_bundle / MANIFEST).read_text())
    assert cli_info.main([str(tiny_bundle)]) == 0
    assert "All checksums" in capsys.readouterr().out


def test_decode_steps_skip_the_interaction_layers(tiny_bundle: Path) -> None:
    """Only a branch for latents reads the weights of interaction layers."""
    graph = onnx.load(tiny_bundle / "llm.onnx", load_external_data=False).graph
    assert not [name for node in graph.node for name in node.input if name.startswith("alignment.")]
    branches = [node.attribute for node in graph.node if node.op_type == "If"]
    bodies = [{one.name: one.g for one in attributes} for attributes in branches]
    used = [name for body in bodies for node in body["then_branch"].node for name in node.input]
    assert any(name.startswith("alignment.") for name in used)
    assert len(bodies) == open_bundle(tiny_bundle).manifest.model.alignment.layers
    assert all([node.op_type for node in body["else_branch"].node] == ["Identity"] for body in bodies)


def test_the_eager_interpreter_skips_the_interaction_layers(tiny_bundle: Path) -> None:
    ops = EagerOperations(open_bundle(tiny_bundle).manifest.model, lambda name: torch.zeros(1))
    x = torch.ones(1, 1, 4)
    assert ops.if_any(torch.zeros(0, 0), lambda: pytest.fail("the branch was computed"), otherwise=x) is x
