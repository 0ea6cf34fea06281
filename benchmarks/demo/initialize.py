"""Demo model before training: a small random FUSION checkpoint in the released layout."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion_edge.benchmarks.demo import tokenizer
from fusion_edge.benchmarks.demo.subspaces import HEAD_DIM, HEADS, query_matrix
from fusion_edge.benchmarks.json_file import write_json
from fusion_edge.export.checkpoint.tensor_mapping import UNUSED, VISION_MODEL, parameters
from fusion_edge.runtime.bundle.config import AlignmentConfig, FusionConfig, LanguageConfig, VisionConfig

VOCABULARY = tokenizer.PIECES + len(tokenizer.ADDED)
ROPE_THETA = 10000.0
ORIGINAL_POSITIONS, POSITIONS = 4096, 131072
SHORT_FACTORS = tuple(1 + 0.01 * i for i in range(HEAD_DIM // 2))
LONG_FACTORS = tuple(1 + 2.0 * i for i in range(HEAD_DIM // 2))
END_TOKENS = ("<|end|>", "<|assistant|>", "<|endoftext|>")
COPY_NOISE = 0.3
QUERY_GAIN = 3.0  # sharpens attention: a feature has more values than the one that is asked
INPUT, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PATCH_KERNEL = f"{VISION_MODEL}embeddings.patch_embedding.weight"
PATCH_POSITIONS = f"{VISION_MODEL}embeddings.position_embedding.weight"

CONFIG = FusionConfig(
    template="phi_3",
    vision=VisionConfig(width=256, layers=4, mlp_width=512, patch_size=48),
    language=LanguageConfig(
        hidden_size=256,
        layers=4,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        mlp_width=512,
        vocab_size=VOCABULARY,
        norm_eps=1e-5,
        rotary_inverse_frequencies=tuple(
            ROPE_THETA ** (-2 * i / HEAD_DIM) / factor for i, factor in enumerate(SHORT_FACTORS)
        ),
        rotary_scale=math.sqrt(1 + math.log(POSITIONS / ORIGINAL_POSITIONS) / math.log(ORIGINAL_POSITIONS)),
    ),
    alignment=AlignmentConfig(layers=3, start=0, stride=1, window_size=3, query_lengths=(4, 16)),
    max_length=tokenizer.MAX_LENGTH,
    bos_token_id=1,
    eos_token_ids=tuple(tokenizer.PIECES + tokenizer.ADDED.index(token) for token in END_TOKENS),
)
"""Structure of the demo model. Every width is a multiple of 128, so INT4 groups of 128 fit."""


def initial_tensors(seed: int) -> dict[str, Tensor]:
    """Return random float32 tensors of :data:`CONFIG` under the released names, unused ones included."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {source.tensor: source.shape for parameter in parameters(CONFIG).values() for source in parameter.sources}
    shapes |= dict.fromkeys(UNUSED, (CONFIG.vision.width,))
    tensors = {name: _initial(name, shape, generator) for name, shape in sorted(shapes.items())}
    tensors[PATCH_POSITIONS] = grid_positions(CONFIG.vision.grid, CONFIG.vision.width)
    _start_as_copies(tensors)
    return tensors


def _start_as_copies(tensors: dict[str, Tensor]) -> None:
    """Let words look for what they name, and values pass through attention and interaction layers, in place.

    Without it, training spends its time on finding out where to look. The first layer gathers what a question asks for
    at the end of the prompt, later layers look for that.
    """
    hidden = CONFIG.language.hidden_size
    identity = torch.eye(hidden)
    for k in range(CONFIG.alignment.layers):
        layer = f"model.vision_sampler_layers.{k}.layers.0."
        attention = f"{layer}cross_attn."
        copying = [f"{attention}{part}_proj.1" for part in "qkv"] + [f"{layer}proj_context", f"{attention}o_proj"]
        for name in (*copying, f"{layer}proj_out.linear_1", f"{layer}proj_out.linear_2"):
            tensors[f"{name}.weight"] = COPY_NOISE * tensors[f"{name}.weight"] + identity
        tensors[f"{attention}q_proj.1.weight"] += query_matrix(asks_words=False) - identity
        tensors[f"{layer}proj_out.linear_2.weight"] *= 0.5
        joined = tensors[f"{layer}proj_in.weight"]
        joined.copy_(COPY_NOISE * joined + torch.cat([identity, identity], 1))
    for i in range(CONFIG.language.layers):
        layer = f"model.layers.{i}.self_attn."
        starts = (QUERY_GAIN * query_matrix(asks_words=i == 0), identity, identity)
        for part, start in zip(tensors[f"{layer}qkv_proj.weight"].chunk(3), starts, strict=True):
            part.copy_(COPY_NOISE * part + start)
        output = tensors[f"{layer}o_proj.weight"]
        output.copy_(0.5 * (COPY_NOISE * output + identity))


def write_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write bfloat16 weights and every other file of a released checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "model-00001-of-00001.safetensors"
    weights = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in sorted(tensors.items())}
    save_file(weights, folder / name, metadata={"format": "pt"})
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(weights, name)}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", _config_json())
    generation = {"bos_token_id": CONFIG.bos_token_id, "eos_token_id": CONFIG.eos_token_ids, "pad_token_id": 0}
    write_json(folder / "generation_config.json", generation)
    tokenizer.write_tokenizer(folder)


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    if "embed_tokens" in name:
        return 0.5 * torch.randn(shape, generator=generator)
    scale = 1 / math.sqrt(math.prod(shape[1:]))
    residual = ("o_proj.weight", "out_proj.weight", "fc2.weight", "down_proj.weight")
    if name.endswith(residual):  # residual branches start small
        scale /= math.sqrt(2 * CONFIG.language.layers)
    return scale * torch.randn(shape, generator=generator)


def grid_positions(grid: int, width: int) -> Tensor:
    """Return sines and cosines of row and column ``[grid*grid, width]``, similar for neighbors."""
    frequencies = math.pi / grid * torch.linspace(0.5, grid / 2, width // 4)
    angles = (torch.arange(grid) + 0.5)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)
    return 0.5 * torch.cat([rows, columns], dim=1)


def _config_json() -> dict[str, object]:
    """Return :data:`CONFIG` with the fields of a released ``config.json``."""
    vision, language, alignment = CONFIG.vision, CONFIG.language, CONFIG.alignment
    return {
        "architectures": ["FusionPhiForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": CONFIG.bos_token_id,
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "image_aspect_ratio": "static_hd",
        "initializer_range": 0.02,
        "intermediate_size": language.mlp_width,
        "max_position_embeddings": POSITIONS,
        "mm_hidden_size": vision.width,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": True,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"siglip-demo-patch{vision.patch_size}-384",
        "model_type": "fusion_phi",
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "num_key_value_heads": language.kv_heads,
        "num_of_vision_sampler_layers": alignment.layers,
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
        "pad_token_id": 0,
        "query_len": ",".join(map(str, alignment.query_lengths)),
        "resid_pdrop": 0.0,
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS, "type": "longrope"},
        "rope_theta": ROPE_THETA,
        "sliding_window": 262144,
        "start_of_vision_sampler_layers": alignment.start,
        "stride_of_vision_sampler_layers": alignment.stride,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": CONFIG.max_length,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.1",
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": language.vocab_size,
        "window_size": alignment.window_size,
    }
