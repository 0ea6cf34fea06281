"""Invalid prequantized checkpoints: ``fusion-export`` refuses them in one line and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.prequantized_checkpoints import (
    DOWN,
    SMALL,
    Tensors,
    edit_config,
    edit_tensors,
    packer,
    read_fixture,
    write_quantized,
)

from fusion_edge.export import cli

Refuse = Callable[..., str]
VARIANTS = {"gptq": "gptq-v2-asym-desc-act", "ct": "ct-asym-group", "bnb": "bnb-nf4-nested"}
STATE = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    written = {}
    for layout, variant in VARIANTS.items():
        fixture = read_fixture(variant)
        written[layout] = write_quantized(folder / layout, fixture.config, fixture.tensors, packer(variant))
    return written


@pytest.fixture
def refuse(originals: dict[str, Path], tmp_path: Path, refused: Refuse) -> Refuse:
    """Return ``refuse(layout, edit, *options, **config)``: it returns the error for a changed checkpoint.

    ``edit`` changes the tensors, and ``config`` the fields of ``quantization_config``.
    """

    def run(layout: str, edit: Callable[[Tensors], object] | None, *options: str, code: int = 1, **config: Any) -> str:
        copy = shutil.copytree(originals[layout], tmp_path / "FUSION-broken")
        edit_config(copy, quantization_config=read_fixture(VARIANTS[layout]).config | config)
        if edit is not None:
            edit_tensors(copy, edit)
        output = tmp_path / "output"
        output.mkdir()
        message = refused(cli.main, copy, "-o", output / "bundle", *options, code=code)
        assert not list(output.iterdir())
        return message

    return run


def group(**fields: Any) -> dict[str, Any]:
    """Return ``config_groups`` with other fields of the weights."""
    (scheme,) = read_fixture("ct-asym-group").config["config_groups"].values()
    return {"group_0": scheme | {"weights": scheme["weights"] | fields}}


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ("gptq", {"quant_method": "awq"}, "quant_method is 'awq'; expected 'gptq' or 'compressed-tensors' or"),
        ("gptq", {"quant_method": None}, "quant_method is None; expected"),
        ("gptq", {"bits": 3}, "bits is 3; expected 4 or 8"),
        ("gptq", {"group_size": 0}, "group_size is 0; expected -1 or a positive integer"),
        ("gptq", {"group_size": "32"}, "group_size is '32'; expected"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; expected 'gptq' or 'gptq_v2'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format is True; expected False"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype is 'int16'; expected 'int32'"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic is {'+:.*': {'bits': 8}}; expected null"),
        ("ct", {"format": "float-quantized"}, "format is 'float-quantized'; expected 'pack-quantized'"),
        ("ct", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is {'num_bits': 8}; expected null"),
        ("ct", {"config_groups": []}, "config_groups is []; expected an object"),
        ("ct", {"config_groups": group(num_bits=3)}, "config_groups.group_0.weights.num_bits is 3; expected 4 or 8"),
        ("ct", {"config_groups": group(type="float")}, "weights.type is 'float'; expected 'int'"),
        ("ct", {"config_groups": group(strategy="tensor")}, "weights.strategy is 'tensor'; expected 'group'"),
        ("ct", {"config_groups": {}}, "no target of config.json's quantization_config.config_groups matches"),
        ("bnb", {"load_in_8bit": True}, "load_in_8bit is True; expected False"),
        ("bnb", {"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type is 'af4'; expected 'nf4' or 'fp4'"),
        ("bnb", {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'; expected 'uint8'"),
    ],
)
def test_unsupported_quantization_config(refuse: Refuse, layout: str, config: dict[str, Any], message: str) -> None:
    assert message in refuse(layout, None, **config)


def test_quantized_activations_are_refused(refuse: Refuse) -> None:
    groups = group()
    groups["group_0"]["input_activations"] = {"num_bits": 8}
    assert "group_0.input_activations is {'num_bits': 8}; expected" in refuse("ct", None, config_groups=groups)


@pytest.mark.parametrize("value", [3, "gptq", []])
def test_quantization_config_must_be_an_object(
    originals: dict[str, Path], tmp_path: Path, refused: Refuse, value: object
) -> None:
    copy = shutil.copytree(originals["gptq"], tmp_path / "broken")
    edit_config(copy, quantization_config=value)
    message = refused(cli.main, copy, "--dry-run")
    assert f"quantization_config is {value!r}; expected an object" in message


def test_quantized_tensors_without_config(originals: dict[str, Path], tmp_path: Path, refused: Refuse) -> None:
    copy = shutil.copytree(originals["gptq"], tmp_path / "broken")
    edit_config(copy, quantization_config=None)
    message = refused(cli.main, copy, "--dry-run")
    assert ".qweight of" in message
    assert "is quantized; expected quantization_config in config.json, or quantize_config.json" in message


def cut(name: str, rows: int = -1) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:rows].clone()

    return edit


def spoil(name: str, value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


@pytest.mark.parametrize(
    ("layout", "edit", "message"),
    [
        ("gptq", cut(f"{DOWN}.qweight"), f"Tensor {DOWN}.qweight of"),
        ("gptq", cut(f"{DOWN}.qzeros"), "has shape [3, 8]; config.json requires [4, 8]"),
        ("gptq", lambda tensors: tensors.pop(f"{DOWN}.scales"), f"Tensor {DOWN}.scales is missing"),
        ("gptq", lambda tensors: tensors.pop(f"{DOWN}.g_idx"), f"Tensor {DOWN}.g_idx is missing"),
        ("gptq", spoil(f"{DOWN}.g_idx", 9), f"{DOWN}.g_idx does not assign 32 columns to each of the groups 0 to 3"),
        ("gptq", spoil(f"{DOWN}.scales", torch.nan), f"{DOWN}.scales of"),
        (
            "gptq",
            lambda tensors: tensors.update({f"{DOWN}.scales": tensors[f"{DOWN}.scales"].int()}),
            "has the type I32; expected BF16 or F16 or F32",
        ),
        ("gptq", lambda tensors: tensors.update({f"{DOWN}.weight": torch.zeros(64, 128)}), "is not part of a FUSION"),
        ("ct", cut(f"{DOWN}.weight_packed"), "has shape [63, 16]; config.json requires [64, 16]"),
        ("ct", cut(f"{DOWN}.weight_zero_point"), "has shape [7, 4]; config.json requires [8, 4]"),
        ("ct", spoil(f"{DOWN}.weight_shape", 64), f"{DOWN}.weight_shape of"),
        ("bnb", cut(f"{DOWN}.weight.absmax"), "has shape [127]; config.json requires [128]"),
        ("bnb", cut(f"{DOWN}.weight"), "has shape [4095, 1]; config.json requires [4096, 1]"),
        ("bnb", lambda tensors: tensors.pop(f"{DOWN}.weight.nested_absmax"), "nested_absmax is missing"),
        ("bnb", lambda tensors: tensors.pop(STATE), f"Tensor {STATE} is missing"),
        ("bnb", spoil(f"{DOWN}.weight.quant_map", 2.0), f"{DOWN}.weight.quant_map of"),
        ("bnb", cut(STATE, 20), "is not a quantization state: it is not valid JSON"),
    ],
)
def test_damaged_tensors(refuse: Refuse, layout: str, edit: Callable[[Tensors], object], message: str) -> None:
    assert message in refuse(layout, edit)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [128, 64]}, "its shape is not [64, 128]"),
        ({"blocksize": 48}, "a block size is 48"),
        ({"blocksize": "64"}, "a block size is '64'"),
        ({"nested_blocksize": 0}, "a block size is 0"),
        ({"nested_offset": 10**400}, "nested_offset is 1000"),
    ],
)
def test_invalid_bitsandbytes_state(refuse: Refuse, fields: dict[str, object], message: str) -> None:
    def edit(tensors: Tensors) -> None:
        state = json.loads(tensors[STATE].numpy().tobytes()) | fields
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    assert message in refuse("bnb", edit)


def test_unsupported_block_size(tmp_path: Path, refused: Refuse) -> None:
    fixture = read_fixture("gptq-v1-sym")
    pack = packer("gptq-v1-sym")
    folder = write_quantized(tmp_path / "checkpoint", fixture.config | {"group_size": 24}, fixture.tensors, pack)

    def regroup(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            module = name.removesuffix(".qzeros")
            inputs = len(tensors[f"{module}.g_idx"])
            count = -(-inputs // 24)
            tensors[f"{module}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // 24
            tensors[name] = tensors[name][:1].repeat(count, 1)
            tensors[f"{module}.scales"] = tensors[f"{module}.scales"][:1].repeat(count, 1)

    edit_tensors(folder, regroup)
    message = refused(cli.main, folder, "--dry-run")
    assert "has groups of 24 columns; expected a multiple of 16" in message


def test_column_range_splits_a_group(tmp_path: Path, refused: Refuse) -> None:
    """``proj_in`` is two matmuls: its halves must not share a group."""
    fixture = read_fixture("gptq-v1-channel")
    pattern = r"model\.(layers|vision_sampler_layers)\."
    pack = packer("gptq-v1-channel")
    folder = write_quantized(tmp_path / "checkpoint", fixture.config, fixture.tensors, pack, pattern)
    message = refused(cli.main, folder, "--dry-run")
    assert "alignment.layers.0.question_in.weight is columns 0 to 64 of" in message
    assert "splits its groups of 128 quantized columns. Requantize it with --rule 'al" in message
    rules = ["--rule", "alignment.layers.*.question_in=int4", "--rule", "alignment.layers.*.latent_in=int8"]
    assert cli.main([str(folder), "--dry-run", *rules]) == 0


@pytest.mark.parametrize(
    ("other", "how"), [("gptq-v1-channel", "differ in bits, groups"), (None, "only partly quantized")]
)
def test_sources_of_one_matmul_must_agree(tmp_path: Path, refused: Refuse, other: str | None, how: str) -> None:
    model = dataclasses.replace(SMALL, template="llama_3")
    fixture = read_fixture("gptq-v1-sym")
    pattern = r"model\.layers\.(0|1\..*q_proj)" if other is None else r"model\.layers\."
    folder = write_quantized(
        tmp_path / "checkpoint", fixture.config, fixture.tensors, packer("gptq-v1-sym"), pattern, model
    )
    edit_config(folder, model_type="fusion_llama")
    name = "model.layers.1.self_attn.k_proj"

    def edit(tensors: Tensors) -> None:
        order = torch.arange(64).roll(1)
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order]

    if other is not None:
        edit_tensors(folder, edit)
    message = refused(cli.main, folder, "--dry-run")
    assert f"{name}.weight" in message
    assert how in message
    assert "--rule 'llm.layers.1.attention.qkv=int4'" in message
    assert cli.main([str(folder), "--dry-run", "--rule", "llm.layers.1.attention.qkv=int4"]) == 0


def test_width_must_be_a_multiple_of_the_block(tiny_checkpoint: Path, refused: Refuse) -> None:
    message = refused(cli.main, tiny_checkpoint, "--dry-run", "--nf4", code=2)
    assert "cannot be nf4:64: its 32 inputs are not whole blocks of 64; use a smaller --group-size" in message
