"""The configuration of a model of one layer, for graphs of single operators."""

from __future__ import annotations

from fusion_edge.runtime.bundle.config import AlignmentConfig, FusionConfig, LanguageConfig, VisionConfig


def one_layer_config(heads: int, kv_heads: int, dim: int) -> FusionConfig:
    """Return a model of one layer. Only its heads matter."""
    language = LanguageConfig(
        hidden_size=heads * dim,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        mlp_width=1,
        vocab_size=1,
        norm_eps=1e-5,
        rotary_inverse_frequencies=(1.0,) * (dim // 2),
        rotary_scale=1.0,
    )
    vision = VisionConfig(width=16, layers=1, mlp_width=1, patch_size=14)
    alignment = AlignmentConfig(layers=1, start=0, stride=1, window_size=3, query_lengths=(4,))
    return FusionConfig("phi_3", vision, language, alignment, max_length=1, bos_token_id=0, eos_token_ids=(0,))
