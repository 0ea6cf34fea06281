"""SmolLM2 as the LLM of a FUSION checkpoint: real weights to quantize, small enough for two cores.

The GGUF file (:func:`read_gguf`) uses llama.cpp's tensor names, the checkpoint those of a released FUSION-LLaMA. Images
have no effect: every image token is the embedding of a line break, and the interaction layer adds nothing. The three
markers of FUSION's prompts that SmolLM2 does not have are line breaks, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fusion_edge.benchmarks.json_file import write_json
from fusion_edge.export.checkpoint.tensor_mapping import UNUSED, parameters
from fusion_edge.runtime.bundle.config import AlignmentConfig, FusionConfig, LanguageConfig, VisionConfig

Floats = npt.NDArray[np.float32]

TEMPLATE = "llama_3"
MAX_LENGTH = 2048
CONTROL = 3  # token type of special tokens in GGUF
LINE_BREAK = "Ċ"  # in byte-level BPE
RENAMED = {
    "<|im_start|>": "<|start_header_id|>",
    "<|im_end|>": "<|eot_id|>",
    "<jupyter_start>": "<|end_header_id|>",
    "<jupyter_text>": "<vision_start>",
    "<jupyter_code>": "<vision_end>",
}
"""Names in FUSION's template by SmolLM2's special token."""
MARKERS = ("<|end_header_id|>", "<vision_start>", "<vision_end>")
"""Renamed tokens without a counterpart in SmolLM2; they get a line break's embedding."""
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensor names of a decoder layer in a checkpoint, by their names in GGUF."""


@dataclass(frozen=True)
class Gguf:
    """Llama model as llama.cpp stores it."""

    fields: Mapping[str, Any]
    """Metadata by key."""
    tensors: Mapping[str, Floats]
    """Dequantized, by name without ``.weight``."""
    formats: Mapping[str, str]
    """Stored type of each tensor."""


def read_gguf(path: Path) -> Gguf:
    """Read and dequantize a GGUF file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    names = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    return Gguf(
        fields={name: field.contents() for name, field in reader.fields.items()},
        tensors={name: np.array(dequantize(t.data, t.tensor_type), np.float32) for name, t in names.items()},
        formats={name: t.tensor_type.name for name, t in names.items()},
    )


def language_config(fields: Mapping[str, Any]) -> LanguageConfig:
    """Return the configuration in a GGUF file's metadata."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    dim = hidden // heads
    theta = fields["llama.rope.freq_base"]
    return LanguageConfig(
        hidden_size=hidden,
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields["llama.attention.head_count_kv"],
        head_dim=dim,
        mlp_width=fields["llama.feed_forward_length"],
        vocab_size=fields["llama.vocab_size"],
        norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rotary_inverse_frequencies=tuple(theta ** (-2 * i / dim) for i in range(dim // 2)),
        rotary_scale=1.0,
    )


def halves_rotated(rows: Floats, heads: int) -> Floats:
    """Reorder the rows of a query or key projection from llama.cpp's order to the checkpoint's.

    llama.cpp rotates neighboring rows of a head (0 and 1, 2 and 3, ...); a checkpoint rotates rows half a head apart.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def language_tensors(tensors: Mapping[str, Floats], language: LanguageConfig) -> dict[str, Floats]:
    """Return a Llama checkpoint's tensors. The embedding table is also ``lm_head``."""
    rotated = {"attn_q": language.heads, "attn_k": language.kv_heads}
    found = {
        "model.embed_tokens.weight": tensors["token_embd"].copy(),
        "model.norm.weight": tensors["output_norm"],
        "lm_head.weight": tensors["token_embd"],
    }
    for i in range(language.layers):
        for stored, name in LAYER_TENSORS.items():
            rows = tensors[f"blk.{i}.{stored}"]
            found[f"model.layers.{i}.{name}.weight"] = (
                halves_rotated(rows, rotated[stored]) if stored in rotated else rows
            )
    return found


def fusion_config(language: LanguageConfig) -> FusionConfig:
    """Return the smallest FUSION model around an LLM: 4 patches per crop, one interaction layer at the end."""
    return FusionConfig(
        template=TEMPLATE,
        vision=VisionConfig(width=32, layers=2, mlp_width=32, patch_size=192),
        language=language,
        alignment=AlignmentConfig(layers=1, start=language.layers - 1, stride=1, window_size=3, query_lengths=(1,)),
        max_length=MAX_LENGTH,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def write_checkpoint(gguf: Gguf, folder: Path) -> None:
    """Write a GGUF file's model as a FUSION checkpoint (float32) to a new folder."""
    folder.mkdir(parents=True)
    config = fusion_config(language_config(gguf.fields))
    tokens: list[str] = gguf.fields["tokenizer.ggml.tokens"]
    llm = language_tensors(gguf.tensors, config.language)
    embeddings = llm["model.embed_tokens.weight"]
    line_break = embeddings[tokens.index(LINE_BREAK)].copy()
    embeddings[[tokens.index(old) for old, new in RENAMED.items() if new in MARKERS]] = line_break
    generator = np.random.default_rng(0)
    shapes = {source.tensor: source.shape for p in parameters(config).values() for source in p.sources}
    shapes |= dict.fromkeys(UNUSED, (config.vision.width,))
    tensors = {
        name: llm[name] if name in llm else generator.normal(float("norm" in name), 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors["model.mm_projector.2.weight"][:] = 0
    tensors["model.mm_projector.2.bias"][:] = line_break
    tensors["model.vision_sampler_layers.0.layers.0.proj_out.linear_2.weight"][:] = 0
    file = "model.safetensors"
    save_file(tensors, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)})
    write_json(folder / "config.json", _config_json(config, gguf.fields["llama.rope.freq_base"]))
    write_json(folder / "generation_config.json", {"eos_token_id": list(config.eos_token_ids)})
    _write_tokenizer(gguf.fields, folder)


def _config_json(config: FusionConfig, rope_theta: float) -> dict[str, object]:
    """Return ``config.json`` with the fields of a released FUSION-LLaMA checkpoint."""
    language, alignment = config.language, config.alignment
    return {
        "bos_token_id": config.bos_token_id,
        "head_dim": language.head_dim,
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "image_aspect_ratio": "static_hd",
        "intermediate_size": language.mlp_width,
        "max_position_embeddings": config.max_length,
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": True,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "model_type": "fusion_llama",
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "num_key_value_heads": language.kv_heads,
        "num_of_vision_sampler_layers": alignment.layers,
        "query_len": ",".join(map(str, alignment.query_lengths)),
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "start_of_vision_sampler_layers": alignment.start,
        "stride_of_vision_sampler_layers": alignment.stride,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": config.max_length,
        "vocab_size": language.vocab_size,
        "window_size": alignment.window_size,
    }


def _write_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """Write byte-level BPE with single digits (llama.cpp's ``smollm``)."""
    names = [str(RENAMED.get(token, token)) for token in fields["tokenizer.ggml.tokens"]]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = {i: name for i, name in enumerate(names) if fields["tokenizer.ggml.token_type"][i] == CONTROL}
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": name} | flags for i, name in special.items()}
    config = {"added_tokens_decoder": added, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", config)
