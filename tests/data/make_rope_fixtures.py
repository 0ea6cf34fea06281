"""Write ``rope_configs.json``: configs as releases of ``transformers`` save them, with their rotary frequencies.

Each run adds the configs of one release. The file in the repository was made by::

    for release in 4.40.2 4.41.2 4.43.4 4.48.1 4.53.3 4.57.6 5.0.0 5.23.0; do
        pip install transformers==$release && python make_rope_fixtures.py  # in a separate environment with torch
    done

A model's ``hub`` config is as published, except for its longrope factors, which are invented. A release
reads and saves it; ``inverse_frequencies`` and ``scale`` come from the release's rotary embedding.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

FILE = Path(__file__).parent / "rope_configs.json"
SIZES = {
    "phi3": {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32},
    "llama": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32},
}
LONGROPE = {"short_factor": [1 + i / 64 for i in range(48)], "long_factor": [1 + i for i in range(48)]}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PHI = {"attention_bias": False, "attention_dropout": 0.0, "original_max_position_embeddings": 4096}
LONG = {"max_position_embeddings": 131072, "rope_theta": 10000.0, "sliding_window": 262144}
MODELS: dict[str, dict[str, Any]] = {
    "Phi-3.5-mini-instruct": {**PHI, **LONG, "rope_scaling": {**LONGROPE, "type": "longrope"}},
    "Phi-3-mini-128k-instruct of April 2024": {**PHI, **LONG, "rope_scaling": {**LONGROPE, "type": "su"}},
    "Phi-3-mini-4k-instruct": {
        **PHI, "max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
    },
    "Llama-3-8B": {"max_position_embeddings": 8192, "rope_scaling": None, "rope_theta": 500000.0},
    "Llama-3.1-8B": {
        "attention_bias": False, "max_position_embeddings": 131072, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
    },
    "A Llama with longrope and its own attention factor": {
        "hidden_size": 3072, "max_position_embeddings": 131072, "rope_theta": 10000.0,
        "rope_scaling": {
            **LONGROPE, "rope_type": "longrope", "factor": 32.0, "attention_factor": 1.25,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip


def configuration(kind: str, hub: dict[str, Any]) -> Any:
    """Return the release's config object. Raises if it does not support the rope type."""
    name = {"phi3": "Phi3", "llama": "Llama"}[kind]
    return getattr(transformers, f"{name}Config")(**json.loads(json.dumps(hub)))


def rotary(kind: str, config: Any) -> tuple[list[float], float]:
    """Return the release's inverse frequencies, and scale of cos and sin, for short contexts."""
    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    dim = config.hidden_size // config.num_attention_heads
    name = {"phi3": "Phi3", "llama": "Llama"}[kind]
    is_long = kind == "phi3" and getattr(config, "rope_scaling", None) is not None
    if is_long and hasattr(module, "Phi3LongRoPEScaledRotaryEmbedding"):
        embedding = module.Phi3LongRoPEScaledRotaryEmbedding(dim, config)
    elif is_long and hasattr(module, "Phi3SuScaledRotaryEmbedding"):
        embedding = module.Phi3SuScaledRotaryEmbedding(dim, config)
    else:
        plain = getattr(module, f"{name}RotaryEmbedding")
        try:
            embedding = plain(config=config)
        except TypeError:  # before 4.48, or 4.43 for Llama
            embedding = plain(dim, max_position_embeddings=config.max_position_embeddings, base=config.rope_theta)
    with torch.no_grad():
        cosine, sine = embedding(torch.zeros(1, 1, 2, dim), torch.tensor([[0, 1]]))
    scale = float(cosine[0, 0, 0])
    frequencies = embedding.inv_freq.double()
    assert torch.allclose(sine[0, 1, : dim // 2].double(), torch.sin(frequencies) * scale, atol=1e-6)
    return frequencies.tolist(), scale


def main() -> None:
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []
    release = transformers.__version__
    stored = [entry for entry in stored if entry["transformers"] != release]
    for model, values in MODELS.items():
        kind = "llama" if "Llama" in model else "phi3"
        hub = {**SIZES[kind], "rms_norm_eps": 1e-5, "vocab_size": 32064, "intermediate_size": 8192, **values}
        if release == "4.48.1":
            frequencies, scale = rotary(kind, configuration(kind, hub))
            stored = [entry for entry in stored if (entry["transformers"], entry["model"]) != ("hub", model)]
            entry = {"model": model, "transformers": "hub", "config": {"model_type": kind, **hub}}
            stored.append({**entry, "inverse_frequencies": frequencies, "scale": scale})
        if kind == "llama" and "long_factor" in (values["rope_scaling"] or {}) and release == "4.43.4":
            continue  # a bug: long factors at every length
        try:
            config = configuration(kind, hub)
            saved = json.loads(config.to_json_string())
            frequencies, scale = rotary(kind, config)
        except (AttributeError, KeyError, ValueError) as error:
            print(f"{release} does not read {model}: {error}")
            continue
        entry = {"model": model, "transformers": release, "config": saved}
        stored.append({**entry, "inverse_frequencies": frequencies, "scale": scale})
    stored.sort(key=lambda entry: (entry["model"], entry["transformers"]))
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in stored)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
