"""Invalid checkpoints: ``fusion-export`` refuses them in one line and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.paths import GOLDEN

from fusion_edge.export import cli

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"  # in the second shard

Refuse = Callable[..., str]
Tensors = dict[str, npt.NDArray[Any]]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "FUSION-broken")


@pytest.fixture
def refuse(checkpoint: Path, tmp_path: Path, refused: Refuse) -> Refuse:
    """Return ``refuse(*options, source=checkpoint, code=1)``: it returns the error and checks that nothing is left."""
    output = tmp_path / "output"
    output.mkdir()

    def run(*options: object, source: object = checkpoint, code: int = 1) -> str:
        message = refused(cli.main, source, "-o", output / "bundle", *options, code=code)
        assert not list(output.iterdir())
        return message

    return run


def edit_json(path: Path, **values: object) -> None:
    """Set fields of a JSON object; ``...`` removes a field."""
    data = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}), encoding="utf-8")


def edit_shard(path: Path, edit: Callable[[Tensors], object]) -> None:
    """Change the tensors of a shard and the index."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    index = path.with_name(INDEX)
    placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    others = {name: file for name, file in placed.items() if file != path.name}
    edit_json(index, weight_map=others | dict.fromkeys(tensors, path.name))


# Checkpoint path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "There is no folder ''"),
        ("missing", "There is no folder 'missing'"),
        ("missing/folder/below", "There is no folder 'missing/folder/below'"),
        ("~nobody-of-this-name/model", "There is no folder '~nobody-of-this-name/model'"),
        ("x" * 300, ": File name too long; check the path"),
        (__file__, "is a file; expected a folder"),
        (GOLDEN / "FUSION-tiny-Phi/config.json", "is a JSON file; expected a folder"),
        (GOLDEN / "FUSION-tiny-Phi/model-00001-of-00004.safetensors", "is a safetensors file"),
        (GOLDEN, "has no weights; expected model.safetensors"),
    ],
)
def test_invalid_checkpoint_path(refuse: Refuse, source: object, message: str) -> None:
    assert message in refuse(source=source)


def test_revision_of_folder_is_refused(refuse: Refuse) -> None:
    assert "does not apply to the local folder" in refuse("--revision", "main", code=2)


@pytest.mark.parametrize("model_type", ["phi3", "llava", None, 3, ["fusion_phi"], {}, ...])
def test_checkpoint_of_another_model(checkpoint: Path, refuse: Refuse, model_type: object) -> None:
    edit_json(checkpoint / "config.json", model_type=model_type)
    found = None if model_type is ... else model_type
    assert f"is not a FUSION checkpoint: its model_type is {found!r}" in refuse()


def test_pickles_are_refused_with_the_command_that_converts_them(checkpoint: Path, refuse: Refuse) -> None:
    for file in (FIRST, SECOND, INDEX):
        (checkpoint / file).unlink()
    (checkpoint / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    message = refuse()
    assert "pytorch_model-00001-of-00002.bin), which can run code when loaded" in message
    assert re.search(r"`python -c \".*weights_only=True.*\"`", message)


# Files of the checkpoint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", FIRST])
def test_missing_file(checkpoint: Path, refuse: Refuse, name: str) -> None:
    (checkpoint / name).unlink()
    message = refuse()
    assert name in message
    assert "missing" in message


def test_no_tokenizer_and_no_index(checkpoint: Path, refuse: Refuse) -> None:
    (checkpoint / "tokenizer.model").unlink()
    assert "has no tokenizer; expected tokenizer.json" in refuse()
    for name in (FIRST, SECOND, INDEX):
        (checkpoint / name).unlink()
    assert "has no weights" in refuse()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_invalid_json_file(checkpoint: Path, refuse: Refuse, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    assert f"{checkpoint / name} " in refuse()


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 100_000, -1])
def test_truncated_shard(checkpoint: Path, refuse: Refuse, keep: int) -> None:
    shard = checkpoint / FIRST
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard} is truncated" in refuse()


def test_corrupt_shard(checkpoint: Path, refuse: Refuse) -> None:
    shard = checkpoint / FIRST
    content = bytearray(shard.read_bytes())
    content[20] ^= 0x80
    shard.write_bytes(content)
    assert f"{shard} has a corrupt safetensors header" in refuse()


def test_web_page_instead_of_shard(checkpoint: Path, refuse: Refuse) -> None:
    (checkpoint / FIRST).write_text("<!DOCTYPE html><html>Not Found</html>", encoding="utf-8")
    assert f"{FIRST} is a web page, perhaps of a failed download" in refuse()


# Tensors ----------------------------------------------------------------------------------------------------


def test_missing_tensor(checkpoint: Path, refuse: Refuse) -> None:
    edit_shard(checkpoint / SECOND, lambda tensors: tensors.pop(NORM))
    assert f"Tensor {NORM} is missing from {checkpoint}; expected shape [32]" in refuse()


def test_unused_tensor(checkpoint: Path, refuse: Refuse) -> None:
    extra = {"model.lora.weight": np.zeros(3, np.float16)}
    edit_shard(checkpoint / SECOND, lambda tensors: tensors.update(extra))
    assert "Tensor model.lora.weight of" in refuse()


def test_tensor_of_wrong_shape(checkpoint: Path, refuse: Refuse) -> None:
    shape = {NORM: np.ones(33, np.float16)}
    edit_shard(checkpoint / SECOND, lambda tensors: tensors.update(shape))
    assert f"Tensor {NORM} of {checkpoint} has shape [33]; config.json requires [32]" in refuse()


def test_integer_tensor(checkpoint: Path, refuse: Refuse) -> None:
    edit_shard(checkpoint / SECOND, lambda tensors: tensors.update({NORM: np.ones(32, np.int8)}))
    assert f"Tensor {NORM} of {checkpoint} has the type I8; expected BF16 or F16 or F32" in refuse()


def test_vision_tower_of_width_zero(checkpoint: Path, refuse: Refuse) -> None:
    def empty(tensors: Tensors) -> None:
        for name in tensors:
            if "patch_embedding.weight" in name:
                tensors[name] = np.zeros((0, 3, 96, 96), np.float16)

    edit_json(checkpoint / "config.json", mm_hidden_size=0)
    edit_shard(checkpoint / FIRST, empty)
    assert "has width 0" in refuse()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        NORM,
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.qkv_proj.weight",
        "model.vision_sampler_layers.0.layers.0.proj_in.weight",
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
    ],
)
def test_weight_not_finite(checkpoint: Path, refuse: Refuse, name: str, value: float) -> None:
    placed = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))["weight_map"]

    def spoil(tensors: Tensors) -> None:
        tensors[name].flat[-1] = value

    edit_shard(checkpoint / placed[name], spoil)
    assert f"Tensor {name} of {checkpoint} holds NaN or infinite values" in refuse()


# config.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_projector_type", "linear"),
        ("image_aspect_ratio", "pad"),
        ("mm_use_im_start_end", False),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("partial_rotary_factor", 0.5),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "cls_patch"),
        ("hidden_size", 33),
        ("hidden_size", "32"),
        ("num_hidden_layers", 10**12),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("head_dim", 10**12),
        ("intermediate_size", -1),
        ("vocab_size", 1208.0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", 10**400),
        ("rope_theta", 1e-320),
        ("rope_scaling", "yarn"),
        ("mm_hidden_size", 64),
        ("query_len", "4,15"),
        ("query_len", "4;16"),
        ("query_len", "4,1024"),
        ("query_len", 10**400),
        ("query_len", None),
        ("window_size", 0),
        ("num_of_vision_sampler_layers", 3),
        ("stride_of_vision_sampler_layers", 2.0),
        ("tokenizer_model_max_length", 63),
        ("tokenizer_model_max_length", ...),
    ],
)
def test_invalid_config_value(checkpoint: Path, refuse: Refuse, field: str, value: object) -> None:
    edit_json(checkpoint / "config.json", **{field: value})
    shown = "missing" if value is ... else repr(value)
    assert re.search(rf"config\.json: {field} is {re.escape(shown)}; expected \S", refuse())


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("field", "value", "original"),
    [
        ("rope_scaling.short_factor", LONGROPE | {"short_factor": [1.0] * 7}, 4096),
        ("rope_scaling.short_factor", LONGROPE | {"short_factor": [0.0] * 8}, 4096),
        ("tokenizer_model_max_length", LONGROPE, 511),
        ("original_max_position_embeddings", LONGROPE, 1),
        ("rope_scaling.factor", LLAMA3 | {"factor": 0}, None),
        ("rope_scaling.high_freq_factor", LLAMA3 | {"high_freq_factor": 1.0}, None),
        ("rope_scaling.original_max_position_embeddings", {**LLAMA3, "original_max_position_embeddings": 0.5}, None),
    ],
)
def test_invalid_rotary_scaling(
    checkpoint: Path, refuse: Refuse, field: str, value: object, original: int | None
) -> None:
    longrope = {"rope_scaling": value, "original_max_position_embeddings": original}
    edit_json(checkpoint / "config.json", **longrope)
    assert f"config.json: {field} is " in refuse()


@pytest.mark.parametrize("value", ["2", [2, "3"], -1, 1208, [2, 10**9]])
def test_invalid_eos_tokens(checkpoint: Path, refuse: Refuse, value: object) -> None:
    edit_json(checkpoint / "generation_config.json", eos_token_id=value)
    assert f"generation_config.json: eos_token_id is {value!r}; expected token ids" in refuse()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([10**400, 1e-320]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = sorted(json.loads((GOLDEN / "FUSION-tiny-Phi/config.json").read_text(encoding="utf-8")))


@given(field=st.sampled_from([*FIELDS, "head_dim", "num_key_value_heads", "mlp_bias"]), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_value(
    checkpoint: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], field: str, value: object
) -> None:
    shutil.copyfile(tiny_checkpoint / "config.json", checkpoint / "config.json")
    edit_json(checkpoint / "config.json", **{field: value})
    code = cli.main([str(checkpoint), "--dry-run"])
    message = capsys.readouterr().err
    assert (code, message.count("\n")) in ((0, 0), (1, 1))


def test_tokenizer_has_more_ids_than_model(checkpoint: Path, refuse: Refuse) -> None:
    edit_json(checkpoint / "config.json", vocab_size=1207)

    def shorten(tensors: Tensors) -> None:
        for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            tensors[name] = tensors[name][:1207].copy()

    edit_shard(checkpoint / FIRST, shorten)
    edit_shard(checkpoint / SECOND, shorten)
    message = refuse()
    assert "'<vision_end>' the id 1207" in message
    assert "vocab_size is 1207" in message
