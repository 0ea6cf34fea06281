"""Quantized checkpoints through the real commands: the same weights bit for bit, the right answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from packed_checkpoints import VARIANTS, packer, read_fixture, write_quantized
from paths import GOLDEN

from fusion_edge.benchmarks.demo.fidelity import first_logits
from fusion_edge.export import cli
from fusion_edge.export.bundle_weights import BundleWeights
from fusion_edge.export.eager_backend import open_checkpoint
from fusion_edge.export.weights import read_parameter
from fusion_edge.runtime import load
from fusion_edge.runtime.bundle import open_bundle

PICTURE = GOLDEN / "phi_one_turn.png"
FORMATS = {
    "bnb-fp4": "fp4:64",
    "bnb-nf4": "nf4:64",
    "bnb-nf4-nested": "nf4:64",
    "ct-actorder": "int4:32",
    "ct-asym-channel": "uint4:128",
    "ct-asym-group": "uint4:32",
    "ct-channel": "int8:128",
    "ct-sym-group": "int4:32",
    "gptq-v1-8bit-sym": "int8:32",
    "gptq-v1-asym": "uint4:32",
    "gptq-v1-channel": "int4:128",
    "gptq-v1-sym": "int4:32",
    "gptq-v2-8bit-asym": "uint8:32",
    "gptq-v2-asym-desc-act": "uint4:32",
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def export(checkpoint: Path, output: Path, *options: str) -> Path:
    assert cli.main([str(checkpoint), "-o", str(output), "--accuracy-level", "0", *options]) == 0
    return output


def answer_agrees(bundle: Path, checkpoint: Path) -> None:
    """First logits of a bundle within 1e-3 of the eager interpreter's on the checkpoint."""
    with load(bundle) as fusion, open_checkpoint(checkpoint) as reference:
        expected = first_logits(reference, PICTURE, "What is it?", [], )
        logits = first_logits(fusion, PICTURE, "What is it?", [])
    assert np.abs(logits - expected).max() <= 1e-3 * expected.std()


@each_variant
def test_weights_are_the_librarys_bit_for_bit_and_logits_agree(variant: str, tmp_path: Path) -> None:
    fixture = read_fixture(variant)
    checkpoint = write_quantized(tmp_path / "checkpoint", fixture.config, fixture.tensors, packer(variant))
    folder = export(checkpoint, tmp_path / "bundle", "--fp32")
    bundle = open_bundle(folder)
    stored = torch.from_numpy(read_parameter(BundleWeights(bundle), "llm.layers.0.mlp.down.weight"))
    assert torch.equal(stored.to(fixture.dequantized.dtype), fixture.dequantized)
    weights = bundle.manifest.weights
    assert weights["llm.layers.0.mlp.down"] == FORMATS[variant]
    assert weights["llm.lm_head"] == "fp32"
    answer_agrees(folder, checkpoint)


def test_every_variant_is_tested() -> None:
    assert set(FORMATS) == set(VARIANTS)
