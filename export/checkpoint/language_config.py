"""Read the language model's fields of ``config.json``, as ``transformers`` 4.40 to 5 write them."""

from __future__ import annotations

import re

from fusion_edge.export.checkpoint.json_fields import JsonFields
from fusion_edge.export.checkpoint.rope_config import read_rope
from fusion_edge.runtime.bundle.config import ALIGNMENT_HEADS, LanguageConfig

MINIMUM_CONTEXT = 64  # tokens
_ATTENTION = re.compile(
    "attention|attn|rope|rotary|sliding|window|qk_|qkv|softcap|alibi|multiplier|logit|layer_types|position_embedding"
)
"""Matches fields that change how attention, positions or logits are computed."""
_SUPPORTED = {
    # read here or in rope_config.py
    "num_attention_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    # read in config.py
    "attention_bias",
    "window_size",
    # Layers with a sliding window: the context is limited to it anyway.
    "max_window_layers",
    "ignore_keys_at_rope_validation",
}
_IGNORED = re.compile("dropout|pdrop|implementation|flash|sdpa|output_")
"""Matches fields that affect training or the implementation only."""


def read_language(fields: JsonFields, tensors: int) -> LanguageConfig:
    """Return the decoder's sizes and rotary frequencies. ``tensors`` is the number of tensors in the checkpoint.

    Raises :class:`FusionError` naming the field, its value and what was expected, also for an unsupported attention
    field.
    """
    for name, value in fields.data.items():
        if value and name not in _SUPPORTED and _ATTENTION.search(name) and not _IGNORED.search(name):
            raise fields.invalid(name, "null: this feature is not supported")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    head_dim = hidden // heads if fields.data.get("head_dim") is None else fields.data["head_dim"]
    if type(head_dim) is not int or head_dim % 2 or not 8 <= head_dim <= 1024:
        raise fields.invalid("head_dim", "an even integer from 8 to 1024")
    if heads % kv_heads:
        raise fields.invalid("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if hidden % ALIGNMENT_HEADS:
        raise fields.invalid("hidden_size", f"a multiple of {ALIGNMENT_HEADS}")
    layers = fields.integer("num_hidden_layers")
    if layers > tensors:
        raise fields.invalid("num_hidden_layers", f"at most {tensors}, the number of tensors")
    frequencies, scale = read_rope(fields, head_dim)
    return LanguageConfig(
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps"),
        rotary_inverse_frequencies=tuple(frequencies),
        rotary_scale=scale,
    )


def read_max_length(fields: JsonFields, layers: int) -> int:
    """Return the maximum context in tokens: the trained length, or the sliding window if that is smaller.

    Sliding-window attention is not implemented. Raises as :func:`read_language`.
    """
    trained = fields.integer("tokenizer_model_max_length", minimum=MINIMUM_CONTEXT)
    window = _window(fields, layers)
    return trained if window is None else min(trained, window)


def _window(fields: JsonFields, layers: int) -> int | None:
    """Return the size of the sliding window in tokens. None: no layer has one."""
    if fields.one_of("use_sliding_window", (True, False, None)) is False:
        return None
    kinds = fields.data.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
            raise fields.invalid("layer_types", f"a list of {layers} items, each {' or '.join(map(repr, known))}")
        if "sliding_attention" not in kinds:
            return None
    elif fields.data.get("sliding_window") is None:
        return None
    return fields.integer("sliding_window", minimum=MINIMUM_CONTEXT)
