"""Read and validate a checkpoint's configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import cast

from fusion_edge.export.checkpoint.json_fields import JsonFields
from fusion_edge.export.checkpoint.language_config import read_language, read_max_length
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import VISION_MODEL
from fusion_edge.runtime.bundle.config import (
    IMAGE_SIZE,
    VISION_HEADS,
    AlignmentConfig,
    FusionConfig,
    LanguageConfig,
    VisionConfig,
    side,
)
from fusion_edge.runtime.errors import FusionError

TEMPLATES = {"fusion_phi": "phi_3", "fusion_llama": "llama_3"}
"""Prompt template by ``model_type``."""

FIXED: Mapping[str, tuple[object, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "image_aspect_ratio": ("static_hd",),
    "mm_use_im_start_end": (True,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "mm_vision_select_layer": (-2,),
    "mm_vision_select_feature": ("patch",),
}
"""Supported values of config fields. No released model has others."""

_TOWERS: Mapping[str, int] = {"so400m": 26, "giant-opt": 39}
"""Number of vision layers by a part of the tower's name: all layers of SigLIP except the last."""

_VISION_FIELDS = re.compile("vision|visual|image|img|mm_")
"""Matches config fields that only vision-language models have."""
_LORA_TENSORS = re.compile(r"\.lora_|\.base_layer\.")


def read_config(checkpoint: Checkpoint) -> FusionConfig:
    """Return the validated config of an opened checkpoint.

    Raises :class:`FusionError` naming the field, its value and what was expected.
    """
    fields = JsonFields(checkpoint.folder / "config.json")
    model_type = fields.data.get("model_type")
    if not isinstance(model_type, str) or model_type not in TEMPLATES:
        raise FusionError(
            f"{checkpoint.folder} is not a FUSION checkpoint: its model_type is {model_type!r}{_kind(fields)}; "
            f"expected {' or '.join(map(repr, TEMPLATES))}. Pass the folder of a FUSION model."
        )
    if lora := next((name for name in checkpoint.tensors if _LORA_TENSORS.search(name)), None):
        raise FusionError(
            f"Tensor {lora} of {checkpoint.folder} belongs to a LoRA adapter: merge it into the model "
            "(merge_and_unload of the `peft` library) and save the result."
        )
    for name, allowed in FIXED.items():
        fields.one_of(name, allowed)
    language = read_language(fields, len(checkpoint.tensors))
    return FusionConfig(
        template=TEMPLATES[model_type],
        vision=_vision(fields, checkpoint),
        language=language,
        alignment=_alignment(fields, language),
        max_length=read_max_length(fields, language.layers),
        bos_token_id=_bos(fields, language.vocab_size),
        eos_token_ids=_eos(fields, language.vocab_size),
    )


def _kind(fields: JsonFields) -> str:
    """Describe another model, for a message."""
    if not isinstance(fields.data.get("model_type"), str):
        return ""
    return ", another vision-language model" if _VISION_FIELDS.search(" ".join(fields.data)) else ", a language model"


def _alignment(fields: JsonFields, language: LanguageConfig) -> AlignmentConfig:
    alignment = AlignmentConfig(
        layers=fields.integer("num_of_vision_sampler_layers"),
        start=fields.integer("start_of_vision_sampler_layers", minimum=0),
        stride=fields.integer("stride_of_vision_sampler_layers"),
        window_size=fields.integer("window_size"),
        query_lengths=_query_lengths(fields),
    )
    last = alignment.start + (alignment.layers - 1) * alignment.stride
    if last >= language.layers:
        raise fields.invalid(
            "num_of_vision_sampler_layers",
            f"fewer: the last would follow LLM layer {last}, but there are {language.layers}",
        )
    return alignment


def _query_lengths(fields: JsonFields) -> tuple[int, ...]:
    text = str(fields.data.get("query_len", ""))
    expected = "comma-separated square numbers such as '4,16,36,64,144'"
    if not re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        raise fields.invalid("query_len", expected)
    try:
        lengths = tuple(sorted({side(int(part)) ** 2 for part in text.split(",")}))
    except ValueError:
        raise fields.invalid("query_len", expected) from None
    longest = fields.integer("tokenizer_model_max_length")
    if lengths[-1] > longest:
        raise fields.invalid("query_len", f"square numbers up to tokenizer_model_max_length ({longest})")
    return lengths


def _vision(fields: JsonFields, checkpoint: Checkpoint) -> VisionConfig:
    """Return the sizes of the vision tower, read from its tensors."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        info = checkpoint.tensors.get(f"{VISION_MODEL}{name}")
        if info is None or len(info.shape) != rank:
            raise FusionError(
                f"Tensor {VISION_MODEL}{name} of rank {rank} is missing from {checkpoint.folder}; expected a "
                "checkpoint with its SigLIP vision tower. Save or download it again."
            )
        return info.shape

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    (mlp_width,) = shape("encoder.layers.0.mlp.fc1.bias", 1)  # the weight may be prequantized
    pattern = re.compile(re.escape(VISION_MODEL) + r"encoder\.layers\.(\d+)\.")
    layers = {int(match[1]) for name in checkpoint.tensors if (match := pattern.match(name))}
    if fields.data.get("mm_hidden_size") != width:
        raise fields.invalid("mm_hidden_size", f"{width}, the width of the vision tower")
    if not width or width % VISION_HEADS or not mlp_width or len(layers) < 2 or not 1 <= patch <= IMAGE_SIZE:
        raise FusionError(
            f"The vision tower of {checkpoint.folder} has width {width}, {len(layers)} layers and patches of "
            f"{patch}; expected a width divisible by {VISION_HEADS}, at least two layers, and patches of at most "
            f"{IMAGE_SIZE}."
        )
    tower = str(fields.data.get("mm_vision_tower"))
    for name, expected in _TOWERS.items():
        if name in tower and len(layers) != expected:
            raise FusionError(
                f"The vision tower of {checkpoint.folder} has {len(layers)} layers; expected {expected}, all of "
                f"{tower} except the last. Save the checkpoint as the released code does."
            )
    return VisionConfig(width=width, layers=len(layers), mlp_width=mlp_width, patch_size=patch)


def _bos(fields: JsonFields, vocab_size: int) -> int:
    """Return the start token of ``config.json``, or else of ``generation_config.json``."""
    source = _generation(fields) if fields.data.get("bos_token_id") is None else fields
    token = source.integer("bos_token_id", minimum=0)
    if token >= vocab_size:
        raise source.invalid("bos_token_id", f"a token id below vocab_size ({vocab_size})")
    return token


def _eos(fields: JsonFields, vocab_size: int) -> tuple[int, ...]:
    """Return the end tokens of ``generation_config.json``, or of ``config.json`` without that file. May be empty."""
    generation = _generation(fields)
    value = generation.data.get("eos_token_id")
    ids = cast("list[object]", value if isinstance(value, list) else [] if value is None else [value])
    if not all(type(one) is int and 0 <= one < vocab_size for one in ids):
        raise generation.invalid("eos_token_id", f"token ids below vocab_size ({vocab_size})")
    return tuple(dict.fromkeys(cast("list[int]", ids)))


def _generation(fields: JsonFields) -> JsonFields:
    """Return the fields of ``generation_config.json``, or of ``config.json`` without that file."""
    path = fields.path.with_name("generation_config.json")
    return JsonFields(path) if os.path.lexists(path) else fields
