"""Rotary frequencies equal those of ``transformers`` for the configs it writes; unsupported fields are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import DATA

from fusion_edge.export.checkpoint.json_fields import JsonFields
from fusion_edge.export.checkpoint.language_config import read_language, read_max_length
from fusion_edge.export.checkpoint.rope_config import read_rope
from fusion_edge.runtime.errors import FusionError

RELEASES: list[dict[str, Any]] = json.loads((DATA / "rope_configs.json").read_text(encoding="utf-8"))
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
LONGROPE = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 4096}
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tokenizer_model_max_length": 512,
}


def config(**values: object) -> JsonFields:
    """Return the ``config.json`` of a model with a head dimension of 16."""
    return JsonFields(Path("config.json"), SIZES | {"rope_theta": 10000.0} | values)


def refused(fields: JsonFields) -> str:
    with pytest.raises(FusionError) as caught:
        read_language(fields, 100)
    return str(caught.value)


@pytest.mark.parametrize("entry", RELEASES, ids=lambda entry: f"{entry['model']}, {entry['transformers']}")
def test_frequencies_and_scale_match_release(entry: dict[str, Any]) -> None:
    fields = JsonFields(Path("config.json"), entry["config"] | {"tokenizer_model_max_length": 2048})
    language = read_language(fields, 1000)
    # Those of transformers are rounded to float32 several times.
    np.testing.assert_allclose(language.rotary_inverse_frequencies, entry["inverse_frequencies"], rtol=2e-6)
    assert language.rotary_scale == pytest.approx(entry["scale"], rel=2e-7)
    window = 2047 if "4k" in entry["model"] else 2048
    assert read_max_length(fields, language.layers) == window


def test_release_table_is_complete() -> None:
    assert {entry["transformers"] for entry in RELEASES} >= {"hub", "4.40.2", "4.48.1", "4.57.6", "5.0.0", "5.23.0"}


PLAIN = read_rope(config(), 16)
LONG = read_rope(config(**ORIGINAL, rope_scaling=LONGROPE), 16)
SLOW = read_rope(config(rope_scaling=LLAMA3 | ORIGINAL), 16)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_scaling": None}, PLAIN),
        ({"rope_scaling": {}}, PLAIN),
        ({"rope_scaling": {"type": None}}, PLAIN),
        ({"rope_scaling": {"rope_type": "default", "attention_factor": 1.0}}, PLAIN),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, PLAIN),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1}}, PLAIN),
        ({"partial_rotary_factor": 1.0, "head_dim": None, "num_key_value_heads": None}, PLAIN),
        ({"rope_scaling": LONGROPE | ORIGINAL}, LONG),
        ({"rope_parameters": LONGROPE, **ORIGINAL, "rope_scaling": None}, LONG),
        ({"rope_parameters": LONGROPE | ORIGINAL, "rope_scaling": LONGROPE, **ORIGINAL}, LONG),
        ({"rope_scaling": LONGROPE | {"type": "su", "factor": 32}, **ORIGINAL}, LONG),
        ({"rope_scaling": LONGROPE | {"rope_type": None, "type": "longrope"}, **ORIGINAL}, LONG),
        ({"rope_scaling": LONGROPE | {"attention_factor": LONG[1]}, **ORIGINAL}, LONG),
        ({"rope_scaling": LONGROPE | {"attention_factor": 1.5}, **ORIGINAL}, (LONG[0], 1.5)),
        ({"rope_scaling": LLAMA3, **ORIGINAL}, SLOW),
        ({"rope_scaling": LLAMA3 | ORIGINAL | {"attention_factor": None, "type": "llama3", "mscale": None}}, SLOW),
    ],
)
def test_equivalent_rope_fields(values: dict[str, object], expected: tuple[list[float], float]) -> None:
    assert read_rope(config(**values), 16) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'; expected 'default'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'; expected"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'; expected"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "su"}}, "rope_scaling.type is 'su'; expected 'llama3'"),
        ({"rope_scaling": LONGROPE, "rope_parameters": LLAMA3}, "rope_scaling.rope_type is 'longrope'; expected"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor is 2.0; expected null"),
        ({"rope_scaling": {"mrope_section": [1, 2]}}, "rope_scaling.mrope_section is [1, 2]; expected null"),
        ({"rope_parameters": LLAMA3 | {"beta_fast": 32}}, "rope_parameters.beta_fast is 32; expected null"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}; expected null"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is 10000.0; expected the value of rope_parameters.rope_theta",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"attention_factor": 1.2}}, "rope_parameters.attention_factor is 1.2; expected 1.0"),
        ({"rope_scaling": LLAMA3 | ORIGINAL | {"attention_factor": 2}}, "rope_scaling.attention_factor is 2"),
        ({"rope_scaling": LONGROPE | {"attention_factor": 0}, **ORIGINAL}, "rope_scaling.attention_factor is 0"),
        ({"rope_scaling": LONGROPE | {"factor": 4.0}, **ORIGINAL}, "rope_scaling.factor is 4.0; expected max_position"),
        (
            {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 8192}, **ORIGINAL},
            "is 4096; expected the value of",
        ),
        ({"rope_scaling": LONGROPE}, "original_max_position_embeddings is missing; expected an integer"),
        ({"rope_theta": None}, "rope_theta is None; expected a positive number"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; expected null"),
        ({"attention_multiplier": 0.01}, "attention_multiplier is 0.01; expected"),
        ({"use_qk_norm": True}, "use_qk_norm is True; expected"),
        ({"qk_layernorm": True}, "qk_layernorm is True; expected"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0; expected"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192; expected"),
    ],
)
def test_unsupported_rope_fields(values: dict[str, object], message: str) -> None:
    assert message in refused(config(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"attention_dropout": 0.1, "attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True},
        {"use_flash_attn": True, "attn_pdrop": 0.1, "output_attentions": True, "max_window_layers": 1},
        {"attn_logit_softcapping": None, "use_qk_norm": False, "window_size": 3, "dtype": "bfloat16"},
    ],
)
def test_ignored_rope_fields(values: dict[str, object]) -> None:
    assert read_language(config(**values), 100) == read_language(config(), 100)


@pytest.mark.parametrize(
    ("values", "positions"),
    [
        ({}, 512),
        ({"sliding_window": None}, 512),
        ({"sliding_window": 262144}, 512),
        ({"sliding_window": 100}, 100),
        ({"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}, 100),
        ({"sliding_window": 100, "use_sliding_window": False}, 512),
        ({"sliding_window": 100, "layer_types": ["full_attention"] * 2}, 512),
        ({"sliding_window": 100, "layer_types": ["full_attention", "sliding_attention"]}, 100),
    ],
)
def test_sliding_window_limits_context(values: dict[str, object], positions: int) -> None:
    assert read_max_length(config(**values), 2) == positions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sliding_window": 63}, "sliding_window is 63; expected an integer from 64"),
        ({"sliding_window": "100"}, "sliding_window is '100'; expected an integer"),
        ({"use_sliding_window": 1}, "use_sliding_window is 1; expected True or False"),
        (
            {"layer_types": ["full_attention"]},
            "expected a list of 2 items, each 'full_attention' or 'sliding_attention'",
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, "expected a list of 2 items"),
        ({"layer_types": ["full_attention", []]}, "expected a list of 2 items"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is missing; expected an integer"),
    ],
)
def test_invalid_sliding_windows(values: dict[str, object], message: str) -> None:
    with pytest.raises(FusionError) as caught:
        read_max_length(config(**values), 2)
    assert message in str(caught.value)
