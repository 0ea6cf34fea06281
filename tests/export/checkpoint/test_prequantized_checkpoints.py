"""Prequantized checkpoints through the commands: weights stay the same bit for bit, answers are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.checkpoints import write_checkpoint
from support.logits import first_logits
from support.parity import assert_computes_its_weights
from support.paths import GOLDEN
from support.prequantized_checkpoints import SMALL, VARIANTS, edit_config, packer, read_fixture, write_quantized

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.export.planning.memory import estimate
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.runtime import Fusion, load
from fusion_edge.runtime.bundle.manifest import QUANTIZATION
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info

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
    """Check a bundle's first logits against the eager interpreter, tolerance 1e-3."""
    with load(bundle) as fusion, open_checkpoint(checkpoint) as reference:
        expected = first_logits(reference, PICTURE, "What is it?")
        logits = first_logits(fusion, PICTURE, "What is it?")
    assert np.abs(logits - expected).max() <= 1e-3 * expected.std()


@each_variant
def test_weights_are_bit_exact_and_logits_agree(variant: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("variant", ["bnb-nf4", "gptq-v1-asym"])
def test_all_linears_may_be_quantized(variant: str, tmp_path: Path) -> None:
    """This includes biases, blocks that cross rows, and a shorter last group."""
    fixture = read_fixture(variant)
    pattern = r"model\.(layers|vision_sampler_layers|vision_tower.*(fc\d|proj)|aux_projector|mm_projector)\b|lm_head"
    source = write_quantized(tmp_path / "source", fixture.config, fixture.tensors, packer(variant), pattern)
    folder = export(source, tmp_path / "bundle")
    weights = open_bundle(folder).manifest.weights
    float_ones = {"llm.embed_tokens", "vision.patch_embedding"}
    assert {name for name, form in weights.items() if form.startswith("int8")} == float_ones
    sizes = {"bnb-nf4": {16, 32, 64}, "gptq-v1-asym": {32}}[variant]
    assert {int(form.split(":")[1]) for name, form in weights.items() if name not in float_ones} == sizes
    stored = BundleWeights(open_bundle(folder))
    with Checkpoint(source) as opened:
        original = CheckpointWeights(opened, match_parameters(opened, read_config(opened)))
        for name in weights.keys() - float_ones:
            expected = read_parameter(original, f"{name}.weight")
            np.testing.assert_array_equal(read_parameter(stored, f"{name}.weight"), expected)
    with load(folder) as fusion:
        backend = EagerBackend(fusion.config, stored)
        reference = Fusion(fusion.manifest, backend, fusion.tokenizer, backend.embed)
        expected, logits = (first_logits(model, PICTURE, "What is it?") for model in (reference, fusion))
    assert np.abs(logits - expected).max() <= 1e-3 * expected.std()


def test_every_variant_is_tested() -> None:
    assert set(FORMATS) == set(VARIANTS)


def test_codebook_matmul_memory_includes_dequantized_weight(tmp_path: Path) -> None:
    """MatMulBnb4 dequantizes the whole weight."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL)
    peaks = []
    for precision in ("int4", "nf4"):
        with Checkpoint(checkpoint) as opened:
            peaks.append(estimate(plan_export(opened, ExportOptions(precision))).activations)
    assert peaks[1] > peaks[0]


# Reports, rules and merged weights ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a GPTQ checkpoint, version 2, with reordered columns."""
    fixture = read_fixture("gptq-v2-asym-desc-act")
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    return write_quantized(folder, fixture.config, fixture.tensors, packer("gptq-v2-asym-desc-act"))


def test_report_and_info_name_prequantized_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(checkpoint), "--int8", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["bundle"]
    folder = export(checkpoint, tmp_path / "bundle", "--int8")
    assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(planned, rel=0.001)
    linears = json.loads((folder / QUANTIZATION).read_text(encoding="utf-8"))["linears"]
    packed = {linear["name"] for linear in linears if linear["method"] == "checkpoint"}
    assert packed == {name for name in open_bundle(folder).manifest.weights if name.startswith("llm.layers.")}
    for linear in linears:
        assert (linear["weight_sqnr"] is None) == (linear["name"] in packed)
        assert linear["format"] == ("uint4:32" if linear["name"] in packed else "int8:128")
    capsys.readouterr()
    assert cli_info.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(packed)} by checkpoint" in shown
    assert f"{len(packed)} in uint4:32" in shown


def test_rule_requantizes_a_weight(checkpoint: Path, tmp_path: Path) -> None:
    name = "llm.layers.0.mlp.down"
    folder = export(checkpoint, tmp_path / "bundle", "--rule", f"{name}=int8:32")
    assert open_bundle(folder).manifest.weights[name] == "int8:32"
    linears = json.loads((folder / QUANTIZATION).read_text(encoding="utf-8"))["linears"]
    assert next(linear for linear in linears if linear["name"] == name)["method"] == "rtn"
    stored = read_parameter(BundleWeights(open_bundle(folder)), f"{name}.weight")
    original = read_fixture("gptq-v2-asym-desc-act").dequantized.float().numpy()
    steps = np.abs(original).reshape(64, -1, 32).max(axis=2).repeat(32, axis=1) / 127
    assert (np.abs(stored - original) <= 0.51 * steps + 1e-4).all()  # columns in place


def test_inputs_are_reordered_only_for_reordered_columns(checkpoint: Path, tmp_path: Path) -> None:
    fixture = read_fixture("gptq-v1-sym")
    in_order = write_quantized(tmp_path / "checkpoint", fixture.config, fixture.tensors, packer("gptq-v1-sym"))
    counts = []
    for name, source in (("scattered", checkpoint), ("in_order", in_order)):
        folder = export(source, tmp_path / name)
        nodes = onnx.load(folder / "llm.onnx", load_external_data=False).graph.node
        counts.append(sum(node.op_type == "Gather" and node.input[1].endswith(".columns") for node in nodes))
    assert counts == [10, 0]  # five matmuls in each of two layers


def test_calibration_leaves_quantized_weights_alone(checkpoint: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", 9)
    options = ["--calibrate", str(tmp_path / "samples"), "--held-out", "1", "--int4", "--group-size", "32"]
    calibrated = export(checkpoint, tmp_path / "calibrated", *options)
    linears = json.loads((calibrated / QUANTIZATION).read_text(encoding="utf-8"))["linears"]
    methods = {linear["name"]: linear["method"] for linear in linears}
    assert methods["llm.layers.0.mlp.down"] == "checkpoint"
    assert methods["llm.lm_head"] == methods["alignment.layers.0.query"] == "gptq"
    weights = [BundleWeights(open_bundle(folder)) for folder in (calibrated, export(checkpoint, tmp_path / "plain"))]
    fitted, plain = (read_parameter(one, "llm.layers.1.mlp.gate.weight") for one in weights)
    np.testing.assert_array_equal(fitted, plain)


def test_merged_and_split_prequantized_weights(tmp_path: Path) -> None:
    """Llama's queries, keys and values are merged; the columns of ``proj_in`` are split."""
    model = dataclasses.replace(SMALL, template="llama_3", language=dataclasses.replace(SMALL.language, kv_heads=2))
    fixture = read_fixture("gptq-v1-asym")
    pack = packer("gptq-v1-asym")
    pattern = r"model\.(layers|vision_sampler_layers)\."
    folder = write_quantized(tmp_path / "checkpoint", fixture.config, fixture.tensors, pack, pattern, model)
    edit_config(folder, model_type="fusion_llama")
    bundle = export(folder, tmp_path / "bundle")
    weights = open_bundle(bundle).manifest.weights
    assert weights["llm.layers.0.attention.qkv"] == weights["alignment.layers.1.latent_in"] == "uint4:32"
    stored = BundleWeights(open_bundle(bundle))
    with Checkpoint(folder) as source:
        original = CheckpointWeights(source, match_parameters(source, read_config(source)))
        for name in ("llm.layers.0.attention.qkv", "alignment.layers.1.latent_in", "alignment.layers.1.question_in"):
            expected = read_parameter(original, f"{name}.weight")
            np.testing.assert_array_equal(read_parameter(stored, f"{name}.weight"), expected)


def test_one_asymmetric_source_makes_the_weight_asymmetric(tmp_path: Path) -> None:
    """A symmetric source gets explicit zero points in an asymmetric weight."""
    model = dataclasses.replace(SMALL, template="llama_3")
    asymmetric, symmetric = packer("gptq-v1-asym"), packer("gptq-v1-sym")
    fixture = read_fixture("gptq-v1-asym")

    def pack(module: str, rows: int, inputs: int) -> dict[str, torch.Tensor]:
        return (asymmetric if module.endswith("k_proj") else symmetric)(module, rows, inputs)

    folder = write_quantized(tmp_path / "checkpoint", fixture.config, fixture.tensors, pack, model=model)
    edit_config(folder, model_type="fusion_llama")
    bundle = open_bundle(export(folder, tmp_path / "bundle"))
    assert bundle.manifest.weights["llm.layers.1.attention.qkv"] == "uint4:32"
    assert bundle.manifest.weights["llm.layers.1.attention.out"] == "int4:32"
    with Checkpoint(folder) as source:
        original = CheckpointWeights(source, match_parameters(source, read_config(source)))
        expected = read_parameter(original, "llm.layers.1.attention.qkv.weight")
    stored = read_parameter(BundleWeights(bundle), "llm.layers.1.attention.qkv.weight")
    np.testing.assert_array_equal(stored, expected)


# --nf4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--group-size", "32"], ["--rule", "llm.layers.0.*=fp4:32"]])
def test_nf4_weights_match_bitsandbytes_and_logits_agree(options: list[str], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL)
    folder = export(checkpoint, tmp_path / "bundle", "--nf4", *options)
    bundle = open_bundle(folder)
    size = 32 if "--group-size" in options else 64
    assert bundle.manifest.weights["alignment.layers.0.query"] == f"nf4:{size}"
    assert bundle.manifest.weights["llm.lm_head"].startswith("int8")
    assert_computes_its_weights(folder, PICTURE, "What is it?")


def test_calibration_rounds_and_measures_nf4(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", 9)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL)
    options = ["--nf4", "--calibrate", str(tmp_path / "samples"), "--held-out", "1"]
    folder = export(checkpoint, tmp_path / "bundle", *options)
    linears = json.loads((folder / QUANTIZATION).read_text(encoding="utf-8"))["linears"]
    (down,) = (linear for linear in linears if linear["name"] == "llm.layers.0.mlp.down")
    assert (down["format"], down["method"]) == ("nf4:64", "rtn")
    assert 15 < down["output_sqnr"] < 30


def test_nf4_in_16_bits(tmp_path: Path) -> None:
    """For CUDA, absmax is float16, as the activations are."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL)
    folder = export(checkpoint, tmp_path / "bundle", "--nf4", "--target", "cuda")
    model = onnx.load(folder / "llm.onnx", load_external_data=False)
    onnx.shape_inference.infer_shapes(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    matmuls = [node for node in model.graph.node if node.op_type == "MatMulBnb4"]
    assert matmuls
    for node in matmuls:
        cast = makers[node.input[2]]
        assert (cast.op_type, cast.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT16)
