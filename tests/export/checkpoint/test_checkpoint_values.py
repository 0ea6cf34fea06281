"""Values that look valid but are not: refused, or read as the released code reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import GOLDEN
from support.prequantized_checkpoints import edit_config, packer, read_fixture, write_quantized
from torch import Tensor

from fusion_edge.export import cli
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.input_files import LARGEST_JSON
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import VISION_MODEL, parameters
from fusion_edge.runtime.bundle.config import AlignmentConfig, FusionConfig, LanguageConfig, VisionConfig
from fusion_edge.runtime.errors import FusionError

PHI, LLAMA = GOLDEN / "FUSION-tiny-Phi", GOLDEN / "FUSION-X-tiny-LLaMA"
Tensors = dict[str, Tensor]


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def copy(source: Path, folder: Path, **values: object) -> Path:
    """Write a checkpoint with other fields in its ``config.json``."""
    shutil.copytree(source, folder)
    edit_json(folder / "config.json", **values)
    return folder


def with_tensors(source: Path, folder: Path, edit: Callable[[Tensors], object]) -> Path:
    """Write a checkpoint with other tensors, in one file."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def read(folder: Path) -> FusionConfig:
    with Checkpoint(folder) as checkpoint:
        config = read_config(checkpoint)
        match_parameters(checkpoint, config)
        return config


def error(folder: Path) -> str:
    with pytest.raises(FusionError) as caught:
        read(folder)
    return str(caught.value)


# config.json and generation_config.json ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, False, "", []])
@pytest.mark.parametrize("name", ["head_dim", "rope_scaling", "rope_parameters"])
def test_false_is_not_null(tmp_path: Path, name: str, value: object) -> None:
    assert f"{name} is {value!r}; expected" in error(copy(PHI, tmp_path / "model", **{name: value}))


@pytest.mark.parametrize("value", [1e-320, 5e-39, 1e39, 1e308])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_number_outside_float32(tmp_path: Path, name: str, value: float) -> None:
    message = error(copy(PHI, tmp_path / "model", **{name: value}))
    assert f"{name} is {value!r}; expected a positive number in the range of float32" in message


def test_contradicting_fields_are_refused(tmp_path: Path) -> None:
    folder = copy(PHI, tmp_path / "model")
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.rstrip()[:-1] + ', "rope_theta": 500000.0}', encoding="utf-8")
    assert "duplicate field 'rope_theta'" in error(folder)


def test_bos_of_generation_config(tmp_path: Path) -> None:
    folder = copy(PHI, tmp_path / "model", bos_token_id=None)
    edit_json(folder / "generation_config.json", bos_token_id=1)
    assert read(folder) == read(PHI)
    edit_json(folder / "generation_config.json", bos_token_id=None)
    assert f"{folder / 'generation_config.json'}: bos_token_id is None" in error(folder)


def test_duplicate_eos_token(tmp_path: Path) -> None:
    folder = copy(PHI, tmp_path / "model")
    edit_json(folder / "generation_config.json", eos_token_id=[7, 9, 7])
    assert read(folder).eos_token_ids == (7, 9)


FIELDS_OF_TRAINING = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "FUSION-X-Phi3.5-3B-Stage1.5",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "freeze_mm_mlp_adapter": False,
    "image_crop_resolution": None,
    "image_grid_pinpoints": None,
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-6,
    "output_attentions": False,
    "partial_rotary_factor": 1.0,
    "tune_mm_mlp_adapter": False,
}


@pytest.mark.parametrize("source", [PHI, LLAMA], ids=lambda path: path.name)
def test_fields_that_training_writes_change_nothing(tmp_path: Path, source: Path) -> None:
    assert read(copy(source, tmp_path / "model", **FIELDS_OF_TRAINING)) == read(source)


# Tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "expected"), [(38, 39), (40, 39)])
def test_layers_of_a_known_tower(tmp_path: Path, kept: int, expected: int) -> None:
    def edit(tensors: Tensors) -> None:
        last = {name: tensor for name, tensor in tensors.items() if f"{VISION_MODEL}encoder.layers.38." in name}
        for name, tensor in last.items():
            if kept < expected:
                del tensors[name]
            else:
                tensors[name.replace("layers.38.", "layers.39.")] = tensor.clone()

    message = error(with_tensors(LLAMA, tmp_path / "model", edit))
    assert f"has {kept} layers" in message
    assert f"expected {expected}" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int64])
@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", f"{VISION_MODEL}post_layernorm.weight"])
def test_unused_tensors_of_any_type(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = with_tensors(LLAMA, tmp_path / "model", lambda t: t.update({name: torch.ones(8, dtype=dtype)}))
    assert read(folder) == read(LLAMA)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_unsupported_dtypes(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)

    folder = with_tensors(LLAMA, tmp_path / "model", edit)
    assert f"has the type {name}; expected BF16 or F16 or F32" in error(folder)


def test_float8_bias_is_refused(tmp_path: Path) -> None:
    bias = {"lm_head.bias": torch.zeros(1007).to(torch.float8_e4m3fn)}
    folder = with_tensors(LLAMA, tmp_path / "model", lambda tensors: tensors.update(bias))
    assert "Tensor lm_head.bias of" in error(folder)


@pytest.mark.parametrize("name", ["x" * 501, "a\nb", "\x1b[31m", "\u202e"])
def test_invalid_tensor_names(tmp_path: Path, name: str) -> None:
    folder = with_tensors(LLAMA, tmp_path / "model", lambda tensors: tensors.update({name: torch.zeros(1)}))
    message = error(folder)
    assert "is not a valid tensor name" in message
    assert len(message) < 1000
    assert message.isprintable()


def test_largest_release_fits_header_limit() -> None:
    """FUSION-X-LLaMA3.1-8B with every linear in bitsandbytes' layout has the most and longest tensor names."""
    language = LanguageConfig(4096, 32, 32, 8, 128, 14336, 128262, 1e-5, (1.0,) * 64, 1.0)
    model = FusionConfig(
        template="llama_3",
        vision=VisionConfig(1536, 39, 6144, 16),
        language=language,
        alignment=AlignmentConfig(10, 0, 3, 3, (144,)),
        max_length=4096,
        bos_token_id=128000,
        eos_token_ids=(128009,),
    )
    ends = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state.bitsandbytes__nf4")
    names: list[str] = []
    for parameter in parameters(model).values():
        stored = [source.tensor for source in parameter.sources]
        names += stored + [f"{name}.{end}" for name in stored for end in ends if parameter.kind == "linear"]
    entry = {"dtype": "BF16", "shape": [14336, 4096], "data_offsets": [10**10, 10**10]}
    assert len(names) > 3000
    assert 1.5 * len(json.dumps(dict.fromkeys(names, entry))) < LARGEST_JSON


# Quantized checkpoints --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fixture = read_fixture("ct-asym-group")
    return write_quantized(
        tmp_path_factory.mktemp("ct") / "model", fixture.config, fixture.tensors, packer("ct-asym-group")
    )


def scheme(**fields: Any) -> dict[str, Any]:
    """Return the fixture's ``quantization_config`` with other fields in its only group."""
    config = read_fixture("ct-asym-group").config
    (only,) = config["config_groups"].values()
    return config | {"config_groups": {"group_0": only | fields}}


@pytest.mark.parametrize(
    "target", ["re:.*self_attn.(q|k|v|o|qkv)_proj$", r"re:model\.layers\.\d+\..*", "re:.*layers.*(mlp|attn).*proj"]
)
def test_target_patterns(compressed: Path, tmp_path: Path, target: str) -> None:
    folder = shutil.copytree(compressed, tmp_path / "model")
    edit_config(folder, quantization_config=scheme(targets=[target, "Linear"]))
    read(folder)


@pytest.mark.parametrize("target", ["re:(.*)*x", "re:(a+)+$", "re:" + ".*" * 20 + "z", "re:("])
def test_slow_target_patterns_are_refused(compressed: Path, tmp_path: Path, target: str) -> None:
    folder = shutil.copytree(compressed, tmp_path / "model")
    edit_config(folder, quantization_config=scheme(targets=[target]))
    assert "expected fast regular expressions" in error(folder)


@pytest.mark.parametrize("order", ["group", "dynamic", True])
def test_missing_column_order(compressed: Path, tmp_path: Path, order: object) -> None:
    folder = shutil.copytree(compressed, tmp_path / "model")
    weights = scheme()["config_groups"]["group_0"]["weights"]
    edit_config(folder, quantization_config=scheme(weights=weights | {"actorder": order}))
    assert "weight_g_idx is missing" in error(folder)


def test_contradicting_gptq_versions(tmp_path: Path) -> None:
    fixture = read_fixture("gptq-v2-asym-desc-act")
    folder = write_quantized(tmp_path / "model", fixture.config | {"checkpoint_format": "gptq"}, fixture.tensors)
    assert "format is 'gptq_v2'; expected the value of checkpoint_format, 'gptq'" in error(folder)


# Tokenizers -------------------------------------------------------------------------------------------------


def test_web_page_instead_of_tokenizer(tmp_path: Path, refused: Callable[..., str]) -> None:
    for source, name in ((LLAMA, "tokenizer.json"), (PHI, "tokenizer.model")):
        folder = copy(source, tmp_path / name)
        (folder / name).write_bytes(b"<!DOCTYPE html><html>Not Found</html>")
        assert f"{folder / name} is a web page" in refused(cli.main, folder, "--dry-run")


def test_slow_tokenizer_without_model_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = copy(PHI, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    content = json.loads((LLAMA / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert f"{folder / 'tokenizer.model'} is missing" in refused(cli.main, folder, "--dry-run")
