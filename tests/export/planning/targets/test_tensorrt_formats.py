"""INT4 blocks of 64 and 128: TensorRT has GEMMs for no others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from support.checkpoints import TINY, write_checkpoint
from support.prequantized_checkpoints import packer, read_fixture, write_quantized

from fusion_edge.export import cli
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.targets.tensorrt import BLOCK_SIZES, TENSORRT
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import UsageError

Refuse = Callable[..., str]
PRESETS = ("tensorrt", "jetson-orin-nano", "jetson-orin", "jetson-thor", "rtx", "rtx-50")


def wide(**language: int) -> FusionConfig:
    sizes: dict[str, Any] = {"hidden_size": 128, "mlp_width": 512, "heads": 8, "kv_heads": 8} | language
    return dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, **sizes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "FUSION-wide", wide())


def block_sizes(folder: Path) -> set[int]:
    """Return the block sizes of all quantized weights in the graphs."""
    sizes: set[int] = set()
    for path in folder.glob("*.onnx"):
        for node in onnx.load(path, load_external_data=False).graph.node:
            attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            sizes |= {attributes["block_size"]} if "block_size" in attributes else set()
    return sizes


# Export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", PRESETS)
@pytest.mark.parametrize("options", ["--int4 --group-size 32", "--fp16 --rule llm.layers.*=int4:32"])
def test_blocks_of_32_are_refused(checkpoint: Path, tmp_path: Path, refused: Refuse, target: str, options: str) -> None:
    arguments = [checkpoint, "-o", tmp_path / "b", "--target", target, *options.split()]
    message = refused(cli.main, *arguments, code=2)
    assert "cannot be int4:32 for TensorRT: it has 4-bit GEMMs only for groups of 64 and 128; use --g" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ("--int4", {128}),
        ("--int4 --group-size 64", {64}),
        ("--int4 --group-size channel", {128}),
        ("--int4 --rule llm.layers.0.*=int4:64", {64, 128}),
        ("--int8", set()),
    ],
)
def test_blocks_of_bundles(checkpoint: Path, tmp_path: Path, options: str, blocks: set[int]) -> None:
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "b"), "--target=tensorrt", *options.split()]) == 0
    assert block_sizes(tmp_path / "b") == blocks


@pytest.mark.parametrize(
    ("fmt", "shape", "reason"),
    [
        ("int4:32", (64, 128), "groups of 64 and 128; use --group-size 64 or 128, in a rule int4:128, or use"),
        ("int4:32", (64, 192), "groups of 64 and 128; use --group-size 64, in a rule int4:64, or use another"),
        ("int4:128", (64, 192), "its 192 inputs are not whole groups of 128; use --group-size 64, in a rule int4:64"),
        ("int4:channel", (64, 192), "its 192 inputs are not whole groups of 128; use --group-size 64"),
        ("int4:32", (64, 96), "its 96 inputs are not whole groups of 64 or 128; keep it in float16, or use another"),
        ("int4:64", (63, 64), "its 63 outputs are odd, and two share a byte; keep it in float16"),
        ("nvfp4", (64, 40), "its 40 inputs are not whole blocks of 16; keep it in float16"),
    ],
)
def test_remedies(fmt: str, shape: tuple[int, int], reason: str) -> None:
    """The format that an error proposes is accepted."""
    name = "llm.layers.0.mlp.up"
    weight = Parameter(f"{name}.weight", "linear", shape, ())
    with pytest.raises(UsageError) as refused:
        TENSORRT.check_formats({name: Linear(weight, WeightFormat.parse(fmt))})
    assert f"{name} cannot be {fmt} for TensorRT: " in str(refused.value)
    assert reason in str(refused.value)
    for size in BLOCK_SIZES:
        if f"int4:{size}" in reason:
            TENSORRT.check_formats({name: Linear(weight, WeightFormat("int4", size))})
    TENSORRT.check_formats({name: Linear(weight, WeightFormat.parse("fp16"))})


def test_windows_are_not_quantized_to_fp4() -> None:
    """TensorRT takes activations of two and three dimensions."""
    for name, is_refused in (("context", True), ("key", True), ("value", True), ("query", False), ("mlp.up", False)):
        weight = Parameter(f"alignment.layers.3.{name}.weight", "linear", (64, 64), ())
        linears = {weight.linear: Linear(weight, WeightFormat.parse("nvfp4"))}
        if is_refused:
            with pytest.raises(UsageError, match=f"{name} cannot be nvfp4 for TensorRT: it reads windows of the image"):
                TENSORRT.check_formats(linears)
        else:
            TENSORRT.check_formats(linears)


@pytest.mark.parametrize("target", PRESETS)
def test_defaults(checkpoint: Path, tmp_path: Path, target: str) -> None:
    """TensorRT documents INT4 alone for weights with float activations."""
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "b"), f"--target={target}"]) == 0
    weights = open_bundle(tmp_path / "b").manifest.weights
    assert weights["llm.lm_head"] == "fp16"
    assert {fmt for name, fmt in weights.items() if name.startswith("vision.")} == {"fp16"}


def test_blackwell_gets_the_bundle_of_other_desktop_gpus(checkpoint: Path, tmp_path: Path) -> None:
    """No format of its own measured better: docs/tensorrt.md has the figures."""
    for target in ("rtx", "rtx-50"):
        assert cli.main([str(checkpoint), "-o", str(tmp_path / target), f"--target={target}"]) == 0
    older, newer = ((tmp_path / target / MANIFEST).read_bytes() for target in ("rtx", "rtx-50"))
    assert older == newer  # it has the checksums of all files


def test_lm_head_is_small_where_memory_needs_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(checkpoint), "--target=tensorrt", "--dry-run", "--json"]

    def planned(*more: str) -> tuple[Any, str]:
        assert cli.main([*command, *more]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    large, silence = planned()
    small, note = planned(f"--fit={large['peak'] - 1}")
    assert silence == ""
    assert note.startswith("note: llm.lm_head is int4:128, less accurate than fp16, with which the peak of ")
    assert note.count("\n") == 1
    assert (large["formats"]["llm.lm_head"], small["formats"]["llm.lm_head"]) == ("fp16", "int4:128")
    assert small["peak"] < large["peak"]
    same, silence = planned(f"--fit={large['peak']}")
    assert (same["formats"], silence) == (large["formats"], "")


@pytest.mark.parametrize(
    ("shape", "group_size", "fmt"),
    [
        ((64, 256), None, "int4:128"),
        ((64, 256), 64, "int4:64"),
        ((64, 192), None, "int4:64"),
        ((64, 96), None, "fp16"),
        ((63, 128), None, "fp16"),
    ],
)
def test_lm_head(shape: tuple[int, int], group_size: int | None, fmt: str) -> None:
    assert str(TENSORRT.lm_head_format(shape, group_size, is_small=True)) == fmt
    assert str(TENSORRT.lm_head_format(shape, group_size, is_small=False)) == "fp16"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--target cpu --rule llm.lm_head=fp8", "fp8 (llm.lm_head) does not run on --target cpu; use int8, or"),
        ("--target tensorrt --rule llm.embed_tokens=fp8", "llm.embed_tokens cannot be fp8: it is looked up by row"),
        ("--target tensorrt --rule llm.lm_head=fp8:64", "Unknown weight format 'fp8:64'"),
        ("--target tensorrt --rule vision.*=w8a8", "needs samples for the range of its activations: add --calibrate"),
    ],
)
def test_refused_8_bit_formats(checkpoint: Path, tmp_path: Path, refused: Refuse, options: str, reason: str) -> None:
    assert reason in refused(cli.main, checkpoint, "-o", tmp_path / "b", *options.split(), code=2)


# Prequantized checkpoints ----------------------------------------------------------------------------------------


def quantized(folder: Path, variant: str, model: FusionConfig) -> Path:
    """Write a prequantized checkpoint with random decoder layers in a variant's layout."""
    fixture, pack = read_fixture(variant), packer(variant)
    language = model.language
    down = pack("model.layers.0.mlp.down_proj", language.hidden_size, language.mlp_width)
    return write_quantized(folder, fixture.config, down, pack, model=model)


def test_groups_of_32_in_a_prequantized_checkpoint(tmp_path: Path, refused: Refuse) -> None:
    """The remedy is one rule for all layers."""
    checkpoint = quantized(tmp_path / "checkpoint", "gptq-v1-sym", wide())
    command = [checkpoint, "-o", tmp_path / "b", "--target", "tensorrt"]
    message = refused(cli.main, *command, code=2)
    assert "llm.layers.0.attention.qkv cannot be int4:32 for TensorRT: it has 4-bit GEMMs only for groups" in message
    assert "; quantize it anew (--rule 'llm.layers.*.attention.qkv=int4:128'), or" in message
    rules = [f"--rule=llm.layers.*.{name}=int4:128" for name in ("attention.*", "mlp.*")]
    assert cli.main([*map(str, command), *rules]) == 0
    assert block_sizes(tmp_path / "b") == {128}


@pytest.mark.parametrize(("width", "block"), [(256, 128), (512, 128), (320, 64)])
def test_rows_with_one_scale_are_stored_in_blocks(tmp_path: Path, width: int, block: int) -> None:
    """Other targets store them in blocks of 256. The weights are the same bit for bit."""
    model = wide(hidden_size=256, mlp_width=width, heads=16, kv_heads=16)
    checkpoint = quantized(tmp_path / "checkpoint", "gptq-v1-channel", model)
    eight_bits = "--rule=alignment.*=int8:channel"
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "b"), "--target=tensorrt", eight_bits]) == 0
    assert block_sizes(tmp_path / "b") == {128, block}
    bundle = open_bundle(tmp_path / "b")
    stored = BundleWeights(bundle)
    with Checkpoint(checkpoint) as source:
        original = CheckpointWeights(source, match_parameters(source, read_config(source)))
        for name in ("attention.qkv", "attention.out", "mlp.down"):
            assert bundle.manifest.weights[f"llm.layers.1.{name}"] == f"int4:{block if name == 'mlp.down' else 128}"
            expected = read_parameter(original, f"llm.layers.1.{name}.weight")
            np.testing.assert_array_equal(read_parameter(stored, f"llm.layers.1.{name}.weight"), expected)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "cpu")]) == 0
    assert open_bundle(tmp_path / "cpu").manifest.weights["llm.layers.1.attention.out"] == "int4:256"
