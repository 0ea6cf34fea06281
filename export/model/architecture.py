"""The FUSION model as plain functions over the operations of :mod:`fusion_edge.export.model.operations`.

The eager interpreter computes them with torch; the lowerings emit them as ONNX graphs. Letters in shapes: N crops,
B sequences, P patches of a crop, T text tokens, L tokens of a sequence, R questions, q latents per question, W vision
width, D hidden size. Section numbers refer to ``docs/fusion-model.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from fusion_edge.export.model.operations import Operations, T
from fusion_edge.runtime.bundle.config import (
    ALIGNMENT_HEADS,
    ALIGNMENT_NORM_EPS,
    VISION_HEADS,
    VISION_NORM_EPS,
    FusionConfig,
)


@dataclass(frozen=True)
class Alignment(Generic[T]):
    """Inputs of the interaction layers during prefill (section 5)."""

    latent_positions: T
    """``[R, q]`` int64: rows of the latents in the flattened ``[B * L, D]``."""
    question_positions: T
    """``[R]`` int64: row of each question's last prompt token."""
    keys: T
    """``[layers, q, 9, D]`` (or ``[layers * B, ...]`` when training on B images)."""
    values: T
    """Like ``keys``."""


# Vision encoder: section 2 ---------------------------------------------------------------------------------


def vision_encoder(ops: Operations[T], config: FusionConfig, pixels: T, text_embeds: T, text_mask: T) -> T:
    """Encode crops: pixels ``[N,3,S,S]``, text ``[N,T,D]``, mask ``[N,T]`` -> features ``[N,P,D]``.

    Global crops have no text (T = 0); the local crop has the question's token embeddings.
    """
    patches = embed_patches(ops, config, pixels)
    rows = encode(ops, config, patches, project_text(ops, text_embeds), text_mask)
    return project_vision(ops, ops.head_rows(rows, config.vision.patches))


def embed_patches(ops: Operations[T], config: FusionConfig, pixels: T) -> T:
    """Embed patches and add position embeddings: ``[N,3,S,S]`` -> h_0 ``[N,P,W]``.

    The patch convolution is a matmul over unfolded patches.
    """
    vision = config.vision
    patches = ops.unfold(pixels, vision.grid, vision.patch_size)
    embedded = ops.linear(patches, "vision.patch_embedding", bias=True)
    return embedded + ops.parameter("vision.position_embedding.weight")


def project_text(ops: Operations[T], embeds: T) -> T:
    """Project token embeddings into the vision encoder (``aux_projector``): ``[N,T,D]`` -> ``[N,T,W]``."""
    return _projector(ops, embeds, "vision.text_projector")


def project_vision(ops: Operations[T], rows: T) -> T:
    """Project vision features into the LLM (``mm_projector``): ``[...,3W]`` -> ``[...,D]``."""
    return _projector(ops, rows, "vision.projector")


def _projector(ops: Operations[T], x: T, name: str) -> T:
    hidden = ops.gelu(ops.linear(x, f"{name}.up", bias=True))
    return ops.linear(hidden, f"{name}.down", bias=True)


def encode(ops: Operations[T], config: FusionConfig, patches: T, text: T, text_mask: T) -> T:
    """Run the vision transformer over patches and text: ``[N,P,W]``, ``[N,T,W]`` -> ``[N,P+T,3W]``.

    The output concatenates the last hidden state and the mean input of the layers of each half.
    """
    mask = ops.key_mask(patches, text_mask)
    states = [ops.concat([patches, text], axis=1)]
    for i in range(config.vision.layers):
        states = vision_layer(ops, config, states, mask, i)
    return vision_features(ops, config, states)


def vision_layer(ops: Operations[T], config: FusionConfig, states: Sequence[T], mask: T, i: int) -> list[T]:
    """Run layer ``i``. ``states`` are ``[N,P+T,W]`` each: the hidden state and the sum of layer inputs of each half."""
    half = config.vision.layers // 2
    x, *sums = states
    if i < 2 * half:
        sums[i // half :] = [x] if i % half == 0 else [sums[i // half] + x]
    return [_vision_layer(ops, config, x, mask, f"vision.layers.{i}", text_is_uniform=i < half), *sums]


def vision_features(ops: Operations[T], config: FusionConfig, states: Sequence[T]) -> T:
    """Concatenate the last hidden state and both means: three of ``[N,P+T,W]`` -> ``[N,P+T,3W]``."""
    half = config.vision.layers // 2
    x, *sums = states
    return ops.concat([x, *(ops.scale(total, 1 / half) for total in sums)], axis=-1)


def _vision_layer(ops: Operations[T], config: FusionConfig, x: T, mask: T, name: str, text_is_uniform: bool) -> T:
    """Run a pre-LN layer. In the first half, text tokens attend uniformly to all rows, also masked ones (section 2)."""
    normed = ops.layer_norm(x, f"{name}.attention_norm", VISION_NORM_EPS)
    qkv = ops.linear(normed, f"{name}.attention.qkv", bias=True)
    attended = ops.self_attention(qkv, VISION_HEADS, mask, config.vision.patches if text_is_uniform else None)
    x = x + ops.linear(attended, f"{name}.attention.out", bias=True)
    return x + ops.gelu_mlp(ops.layer_norm(x, f"{name}.mlp_norm", VISION_NORM_EPS), f"{name}.mlp")


# Alignment decoder: section 3 and the image part of section 5 ------------------------------------------------


def alignment_decoder(
    ops: Operations[T], config: FusionConfig, features: T, latent_cells: T, context_cells: T
) -> tuple[T, T, T]:
    """Compute what depends only on the image: features ``[4B,P,D]`` -> latents ``[B,q,D]``, keys and values.

    Keys and values are ``[layers * B, q, 9, D]``. The cells are the tables of
    :func:`fusion_edge.runtime.images.grids.pooling_cells` for sqrt(q) and for window * sqrt(q) cells.
    """
    latents, windows = pool_image(ops, config, features, latent_cells, context_cells)
    pairs = [context_keys_values(ops, k, windows) for k in range(config.alignment.layers)]
    return latents, ops.concat([k for k, _ in pairs], axis=0), ops.concat([v for _, v in pairs], axis=0)


def pool_image(ops: Operations[T], config: FusionConfig, features: T, latent_cells: T, context_cells: T) -> tuple[T, T]:
    """Max-pool the global map adaptively (section 3). Returns latents ``[B,q,D]`` and windows ``[B,q,9,D]``."""
    image = ops.global_map(features, config.vision.grid)
    latents = ops.windows(ops.pool(image, latent_cells), 1)
    windows = ops.windows(ops.pool(image, context_cells), config.alignment.window_size)
    return ops.squeeze_window(latents), windows


def context_keys_values(ops: Operations[T], k: int, windows: T) -> tuple[T, T]:
    """Compute keys and values of interaction layer ``k`` from windows, all ``[B,q,9,D]`` (section 5)."""
    name = f"alignment.layers.{k}"
    context = ops.linear(windows, f"{name}.context")
    keys = ops.linear(ops.layer_norm(context, f"{name}.key_norm", ALIGNMENT_NORM_EPS), f"{name}.key")
    values = ops.linear(ops.layer_norm(context, f"{name}.value_norm", ALIGNMENT_NORM_EPS), f"{name}.value")
    return keys, values


# LLM with recursive alignment: section 5 ----------------------------------------------------------------------


def llm(ops: Operations[T], config: FusionConfig, embeddings: T, alignment: Alignment[T]) -> T:
    """Compute the logits of the last token: embeddings ``[1,L,D]`` -> ``[1,V]``."""
    return logits(ops, config, ops.last_row(decoder(ops, config, embeddings, alignment)))


def decoder(ops: Operations[T], config: FusionConfig, x: T, alignment: Alignment[T] | None) -> T:
    """Run all decoder layers: ``[B,L,D]`` -> ``[B,L,D]`` before the final norm.

    Without ``alignment``, or without latents as in a decode step, the interaction layers are skipped.
    """
    for i in range(config.language.layers):
        x = decoder_layer(ops, config, x, i)
        k = config.alignment.layer_after(i)
        if alignment is not None and k is not None:
            aligned = partial(interaction_layer, ops, config, x, k, alignment)
            x = ops.if_any(alignment.latent_positions, aligned, otherwise=x)
    return x


def decoder_layer(ops: Operations[T], config: FusionConfig, x: T, i: int) -> T:
    """Run one Phi-3 or Llama layer: ``[B,L,D]`` -> ``[B,L,D]``."""
    name, eps = f"llm.layers.{i}", config.language.norm_eps
    qkv = ops.linear(ops.rms_norm(x, f"{name}.attention_norm", eps), f"{name}.attention.qkv")
    x = x + ops.linear(ops.causal_attention(qkv, i), f"{name}.attention.out")
    normed = ops.rms_norm(x, f"{name}.mlp_norm", eps)
    gate, up = ops.linear(normed, f"{name}.mlp.gate"), ops.linear(normed, f"{name}.mlp.up")
    return x + ops.linear(ops.swiglu(gate, up), f"{name}.mlp.down")


def interaction_layer(ops: Operations[T], config: FusionConfig, x: T, k: int, alignment: Alignment[T]) -> T:
    """Update the latents of every question with interaction layer ``k``: ``[B,L,D]`` -> ``[B,L,D]``.

    ``proj_in`` of the concatenation is the sum of two matmuls, so that the question's row is projected once.
    """
    name = f"alignment.layers.{k}"
    questions = ops.linear(ops.take_rows(x, alignment.question_positions), f"{name}.question_in")
    latents = ops.take_rows(x, alignment.latent_positions)
    z = ops.linear(latents, f"{name}.latent_in") + ops.expand_questions(questions)
    queries = ops.linear(ops.layer_norm(z, f"{name}.query_norm", ALIGNMENT_NORM_EPS), f"{name}.query")
    layers = config.alignment.layers
    keys, values = ops.layer(alignment.keys, k, layers), ops.layer(alignment.values, k, layers)
    attended = ops.linear(ops.context_attention(queries, keys, values, ALIGNMENT_HEADS), f"{name}.out")
    normed = ops.add_layer_norm(attended, z, f"{name}.norm", ALIGNMENT_NORM_EPS)
    update = ops.linear(ops.gelu(ops.linear(normed, f"{name}.mlp.up")), f"{name}.mlp.down")
    return ops.put_rows(x, alignment.latent_positions, latents, update)


def logits(ops: Operations[T], config: FusionConfig, rows: T) -> T:
    """Apply the final norm and ``lm_head``: ``[...,D]`` -> ``[...,V]``."""
    return ops.linear(ops.rms_norm(rows, "llm.norm", config.language.norm_eps), "llm.lm_head")
