"""FUSION checkpoints with random weights, exported and run in a fraction of a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from support.paths import GOLDEN

from fusion_edge.export.checkpoint.tensor_mapping import UNUSED, parameters
from fusion_edge.runtime.bundle.config import AlignmentConfig, FusionConfig, LanguageConfig, VisionConfig

PHI = GOLDEN / "FUSION-tiny-Phi"
TINY = FusionConfig(
    template="phi_3",
    vision=VisionConfig(width=32, layers=2, mlp_width=48, patch_size=96),
    language=LanguageConfig(
        hidden_size=32,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp_width=64,
        vocab_size=1208,
        norm_eps=1e-5,
        rotary_inverse_frequencies=tuple(10000 ** (-i / 8) for i in range(8)),
        rotary_scale=1.0,
    ),
    alignment=AlignmentConfig(layers=2, start=0, stride=1, window_size=3, query_lengths=(4, 16)),
    max_length=512,
    bos_token_id=1,
    eos_token_ids=(1204, 1201, 1200),
)


def write_checkpoint(folder: Path, config: FusionConfig) -> Path:
    """Write a checkpoint with random weights into a new folder and return it."""
    folder.mkdir()
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(PHI / name, folder / name)
    shutil.copyfile(PHI / "generation_config.json", folder / "generation_config.json")
    (folder / "config.json").write_text(json.dumps(_config_json(config), indent=1), encoding="utf-8")
    generator = np.random.default_rng(0)
    shapes = {source.tensor: source.shape for p in parameters(config).values() for source in p.sources}
    shapes |= dict.fromkeys(UNUSED, (config.vision.width,))
    tensors = {
        name: generator.normal(float("norm" in name), 0.2, shape).astype(np.float16) for name, shape in shapes.items()
    }
    names = list(tensors)
    shards = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _config_json(config: FusionConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a configuration, with the golden checkpoint's values for other fields."""
    data: dict[str, Any] = json.loads((PHI / "config.json").read_text(encoding="utf-8"))
    language, alignment = config.language, config.alignment
    return data | {
        "mm_hidden_size": config.vision.width,
        "mm_vision_tower": "siglip-tiny",
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "intermediate_size": language.mlp_width,
        "vocab_size": language.vocab_size,
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": None,
        "query_len": ",".join(map(str, alignment.query_lengths)),
        "num_of_vision_sampler_layers": alignment.layers,
        "start_of_vision_sampler_layers": alignment.start,
        "stride_of_vision_sampler_layers": alignment.stride,
        "tokenizer_model_max_length": config.max_length,
    }
