"""Prequantized checkpoints of other tools: optional tensors, and scales that no kernel supports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.prequantized_checkpoints import (
    DOWN,
    Tensors,
    edit_config,
    edit_tensors,
    packer,
    read_fixture,
    write_quantized,
)

from fusion_edge.export import cli

LAYOUTS = {"gptq": "gptq-v1-sym", "ct": "ct-sym-group", "bnb": "bnb-nf4", "nested": "bnb-nf4-nested"}
SCALES = {"gptq": f"{DOWN}.scales", "ct": f"{DOWN}.weight_scale", "bnb": f"{DOWN}.weight.absmax"}
SCALES["nested"] = f"{DOWN}.weight.nested_absmax"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    fixtures = {layout: read_fixture(variant) for layout, variant in LAYOUTS.items()}
    return {
        layout: write_quantized(folder / layout, fixture.config, fixture.tensors, packer(LAYOUTS[layout]))
        for layout, fixture in fixtures.items()
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return ``copy(layout)``, which writes a checkpoint to change."""
    return lambda layout: shutil.copytree(originals[layout], tmp_path / f"FUSION-{layout}")


def language_model(checkpoint: Path, output: Path) -> bytes:
    assert cli.main([str(checkpoint), "-o", str(output)]) == 0
    return (output / "llm.data").read_bytes()


def without_groups(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        del tensors[name]


def with_biases(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[f"{name.removesuffix('scales')}bias"] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)


# Optional tensors and files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [without_groups, with_biases])
def test_gptq_optional_tensors(
    originals: dict[str, Path], copy: Callable[[str], Path], tmp_path: Path, edit: Callable[[Tensors], None]
) -> None:
    checkpoint = copy("gptq")
    edit_tensors(checkpoint, edit)
    assert language_model(checkpoint, tmp_path / "b") == language_model(originals["gptq"], tmp_path / "a")


def test_gptq_desc_act_requires_g_idx(copy: Callable[[str], Path], refused: Callable[..., str]) -> None:
    checkpoint = copy("gptq")
    edit_tensors(checkpoint, without_groups)
    edit_config(checkpoint, quantization_config=read_fixture("gptq-v1-sym").config | {"desc_act": True})
    assert ".g_idx is missing" in refused(cli.main, checkpoint, "--dry-run")


def test_gptq_bias_must_be_zero(copy: Callable[[str], Path], refused: Callable[..., str]) -> None:
    checkpoint = copy("gptq")
    edit_tensors(checkpoint, lambda tensors: tensors.update({f"{DOWN}.bias": torch.full((64,), 0.5)}))
    assert f"Tensor {DOWN}.bias of {checkpoint} is a bias that is not 0" in refused(cli.main, checkpoint, "--dry-run")


@pytest.mark.parametrize("method", [{}, {"quant_method": None}, {"quant_method": "gptq"}])
def test_gptq_quantize_config_file(
    originals: dict[str, Path], copy: Callable[[str], Path], tmp_path: Path, method: dict[str, object]
) -> None:
    checkpoint = copy("gptq")
    edit_config(checkpoint, quantization_config=None)
    config = {name: value for name, value in read_fixture("gptq-v1-sym").config.items() if name != "quant_method"}
    (checkpoint / "quantize_config.json").write_text(json.dumps(config | method), encoding="utf-8")
    assert language_model(checkpoint, tmp_path / "b") == language_model(originals["gptq"], tmp_path / "a")


def test_unsupported_quantize_config(copy: Callable[[str], Path], refused: Callable[..., str]) -> None:
    checkpoint = copy("gptq")
    edit_config(checkpoint, quantization_config=None)
    path = checkpoint / "quantize_config.json"
    path.write_text('{"bits": 3, "group_size": 32}', encoding="utf-8")
    assert f"{path}: bits is 3; expected 4 or 8" in refused(cli.main, checkpoint, "--dry-run")
    path.write_text('{"quant_method": "awq", "bits": 4}', encoding="utf-8")
    assert f"{path}: quant_method is 'awq'; expected 'gptq'" in refused(cli.main, checkpoint, "--dry-run")


def test_quantize_config_of_float_weights_is_ignored(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "float")
    (checkpoint / "quantize_config.json").write_text('{"bits": 3}', encoding="utf-8")
    assert cli.main([str(checkpoint), "--dry-run"]) == 0


@pytest.mark.parametrize("layout", ["gptq", "ct", "bnb"])
def test_missing_quantization_config(copy: Callable[[str], Path], refused: Callable[..., str], layout: str) -> None:
    checkpoint = copy(layout)
    edit_config(checkpoint, quantization_config=None)
    message = refused(cli.main, checkpoint, "--dry-run")
    assert "is quantized; expected quantization_config in config.json, or quantize_config.json" in message


# Scales -----------------------------------------------------------------------------------------------------


def spoil(layout: str, value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[SCALES[layout]].view(-1)[-1] = value

    return edit


@pytest.mark.parametrize(
    ("layout", "value"),
    [
        ("gptq", 0.0),
        ("gptq", -0.25),
        ("gptq", float("inf")),
        ("gptq", float("nan")),
        ("ct", 0.0),
        ("ct", -0.25),
        ("ct", float("-inf")),
        ("ct", float("nan")),
        ("bnb", -0.25),
        ("bnb", float("inf")),
        ("nested", float("nan")),
    ],
)
def test_invalid_scale(copy: Callable[[str], Path], refused: Callable[..., str], layout: str, value: float) -> None:
    checkpoint = copy(layout)
    edit_tensors(checkpoint, spoil(layout, value))
    name = f"{DOWN}.weight.absmax" if layout == "nested" else SCALES[layout]
    message = refused(cli.main, checkpoint, "--dry-run")
    assert (
        f"{name} of {checkpoint} holds the scale {value:g}; expected positive numbers in the range of float32"
        in message
    )
    assert "--rule 'llm.layers.0.mlp.down=int4'" in message


@pytest.mark.parametrize(("value", "taken"), [(1e-9, False), (1e6, False), (1e-6, True), (6e4, True)])
def test_scales_are_checked_in_the_activation_type(
    copy: Callable[[str], Path], refused: Callable[..., str], value: float, taken: bool
) -> None:
    checkpoint = copy("ct")
    edit_tensors(checkpoint, spoil("ct", value))
    assert cli.main([str(checkpoint), "--dry-run"]) == 0  # float32
    if taken:
        assert cli.main([str(checkpoint), "--dry-run", "--target", "cuda"]) == 0
    else:
        message = refused(cli.main, checkpoint, "--dry-run", "--target", "cuda")
        assert f"{SCALES['ct']} of {checkpoint} holds the scale" in message
        assert "expected positive numbers in the range of float16" in message


def test_rule_requantizes_weight_with_zero_scale(copy: Callable[[str], Path]) -> None:
    checkpoint = copy("gptq")
    edit_tensors(checkpoint, spoil("gptq", 0.0))
    assert cli.main([str(checkpoint), "--dry-run", "--rule", "llm.layers.0.mlp.down=int4"]) == 0


def test_zero_absmax_is_accepted(copy: Callable[[str], Path]) -> None:
    checkpoint = copy("bnb")
    edit_tensors(checkpoint, spoil("bnb", 0.0))
    assert cli.main([str(checkpoint), "--dry-run"]) == 0
