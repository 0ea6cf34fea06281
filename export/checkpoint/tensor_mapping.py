"""The table that maps tensor names of a released checkpoint to parameter names of the model.

A *parameter* is an array that the architecture reads (``llm.layers.0.attention.qkv.weight``). Its *sources* are tensors
of the checkpoint, or row or column ranges of them, stacked along the first axis. The table removes the differences
between checkpoints: Llama's three projections become one matmul, which Phi stores already; Phi's ``gate_up_proj``
becomes the two that Llama stores, because splitting their joint result would copy it; ``proj_in`` becomes two, one for
the question's row and one for the latents (section 5 of ``docs/fusion-model.md``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fusion_edge.export.checkpoint.prequantized.layout import PrequantizedTensor
from fusion_edge.runtime.bundle.config import FusionConfig

Kind = Literal["linear", "embedding", "float"]
"""``linear``: weight of a matmul; ``embedding``: the token table; ``float``: norms, biases, position embeddings."""

VISION_MODEL = "model.vision_tower.vision_tower.vision_model."
UNUSED = (f"{VISION_MODEL}post_layernorm.weight", f"{VISION_MODEL}post_layernorm.bias")
"""Tensors of every released checkpoint that the model does not read."""
POSITION_IDS = f"{VISION_MODEL}embeddings.position_ids"
ROTARY_BUFFER = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?(inv_freq|long_inv_freq|cos_cached|sin_cached)"
)
"""Constants that some releases of ``transformers`` save beside the weights. No release reads them."""


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or a range of its rows or columns."""

    tensor: str
    shape: tuple[int, ...]
    """Shape of the whole tensor in the checkpoint."""
    column_range: tuple[int, int] | None = None
    row_range: tuple[int, int] | None = None
    prequantized: PrequantizedTensor | None = None
    """How a prequantized checkpoint stores it; None if the tensor is float."""

    @property
    def first_row(self) -> int:
        """First row of the tensor that belongs to the parameter."""
        return self.row_range[0] if self.row_range else 0

    @property
    def rows(self) -> int:
        """Number of rows of the tensor that belong to the parameter."""
        return self.row_range[1] - self.row_range[0] if self.row_range else self.shape[0]


@dataclass(frozen=True)
class Parameter:
    """An array that the architecture reads."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    """``[outputs, inputs]`` for a linear, ``[rows, width]`` for a table, ``[width]`` for a vector."""
    sources: tuple[Source, ...]

    @property
    def linear(self) -> str:
        """Name of the linear, or of the token table, whose weight this is. Only for kinds other than ``float``."""
        assert self.kind != "float"
        return self.name.removesuffix(".weight")

    @property
    def is_prequantized(self) -> bool:
        """Whether the checkpoint stores it quantized."""
        return any(source.prequantized is not None for source in self.sources)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameters(config: FusionConfig) -> dict[str, Parameter]:
    """Return every parameter of the model by name, in the order in which the graphs read them."""
    return {
        parameter.name: parameter
        for part in (_vision(config), _projectors(config), _alignment(config), _language(config))
        for parameter in part
    }


def _linear(name: str, shape: tuple[int, int], *tensors: str, bias: bool = False) -> Iterator[Parameter]:
    """Yield a linear whose rows are split evenly over ``tensors`` (names without ``.weight``)."""
    rows, inputs = shape[0] // len(tensors), shape[1]
    weights = tuple(Source(f"{tensor}.weight", (rows, inputs)) for tensor in tensors)
    yield Parameter(f"{name}.weight", "linear", shape, weights)
    if bias:
        biases = tuple(Source(f"{tensor}.bias", (rows,)) for tensor in tensors)
        yield Parameter(f"{name}.bias", "float", (shape[0],), biases)


def _norm(name: str, width: int, tensor: str, bias: bool = True) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", "float", (width,), (Source(f"{tensor}.weight", (width,)),))
    if bias:
        yield Parameter(f"{name}.bias", "float", (width,), (Source(f"{tensor}.bias", (width,)),))


def _vision(config: FusionConfig) -> Iterator[Parameter]:
    vision = config.vision
    width, patch = vision.width, vision.patch_size
    name, embeddings = "vision.patch_embedding", f"{VISION_MODEL}embeddings."
    kernel = Source(f"{embeddings}patch_embedding.weight", (width, 3, patch, patch))
    yield Parameter(f"{name}.weight", "linear", (width, 3 * patch * patch), (kernel,))
    bias = Source(f"{embeddings}patch_embedding.bias", (width,))
    yield Parameter(f"{name}.bias", "float", (width,), (bias,))
    positions = Source(f"{embeddings}position_embedding.weight", (vision.patches, width))
    yield Parameter("vision.position_embedding.weight", "float", positions.shape, (positions,))
    for i in range(vision.layers):
        name, tensor = f"vision.layers.{i}", f"{VISION_MODEL}encoder.layers.{i}."
        qkv = (f"{tensor}self_attn.q_proj", f"{tensor}self_attn.k_proj", f"{tensor}self_attn.v_proj")
        yield from _norm(f"{name}.attention_norm", width, f"{tensor}layer_norm1")
        yield from _linear(f"{name}.attention.qkv", (3 * width, width), *qkv, bias=True)
        yield from _linear(f"{name}.attention.out", (width, width), f"{tensor}self_attn.out_proj", bias=True)
        yield from _norm(f"{name}.mlp_norm", width, f"{tensor}layer_norm2")
        yield from _linear(f"{name}.mlp.up", (vision.mlp_width, width), f"{tensor}mlp.fc1", bias=True)
        yield from _linear(f"{name}.mlp.down", (width, vision.mlp_width), f"{tensor}mlp.fc2", bias=True)


def _projectors(config: FusionConfig) -> Iterator[Parameter]:
    width, hidden = config.vision.width, config.language.hidden_size
    yield from _linear("vision.text_projector.up", (width, hidden), "model.aux_projector.0", bias=True)
    yield from _linear("vision.text_projector.down", (width, width), "model.aux_projector.2", bias=True)
    yield from _linear("vision.projector.up", (hidden, 3 * width), "model.mm_projector.0", bias=True)
    yield from _linear("vision.projector.down", (hidden, hidden), "model.mm_projector.2", bias=True)


def _alignment(config: FusionConfig) -> Iterator[Parameter]:
    hidden = config.language.hidden_size
    square = (hidden, hidden)
    for k in range(config.alignment.layers):
        name, tensor = f"alignment.layers.{k}", f"model.vision_sampler_layers.{k}.layers.0."
        attention = f"{tensor}cross_attn."
        yield from _linear(f"{name}.context", square, f"{tensor}proj_context")
        for part in ("key", "value"):
            yield from _norm(f"{name}.{part}_norm", hidden, f"{attention}{part[0]}_proj.0")
            yield from _linear(f"{name}.{part}", square, f"{attention}{part[0]}_proj.1")
        joint = f"{tensor}proj_in.weight", (hidden, 2 * hidden)
        for part, columns in (("question_in", (0, hidden)), ("latent_in", (hidden, 2 * hidden))):
            yield Parameter(f"{name}.{part}.weight", "linear", square, (Source(*joint, columns),))
        yield from _norm(f"{name}.query_norm", hidden, f"{attention}q_proj.0")
        yield from _linear(f"{name}.query", square, f"{attention}q_proj.1")
        yield from _linear(f"{name}.out", square, f"{attention}o_proj")
        yield from _norm(f"{name}.norm", hidden, f"{tensor}norm")
        yield from _linear(f"{name}.mlp.up", square, f"{tensor}proj_out.linear_1")
        yield from _linear(f"{name}.mlp.down", square, f"{tensor}proj_out.linear_2")


def _language(config: FusionConfig) -> Iterator[Parameter]:
    language = config.language
    hidden, vocabulary = language.hidden_size, (language.vocab_size, language.hidden_size)
    embeddings = Source("model.embed_tokens.weight", vocabulary)
    yield Parameter("llm.embed_tokens.weight", "embedding", vocabulary, (embeddings,))
    for i in range(language.layers):
        name, tensor = f"llm.layers.{i}", f"model.layers.{i}."
        yield from _norm(f"{name}.attention_norm", hidden, f"{tensor}input_layernorm", bias=False)
        yield from _query_key_value(config, f"{name}.attention.qkv", f"{tensor}self_attn.")
        heads = language.heads * language.head_dim
        yield from _linear(f"{name}.attention.out", (hidden, heads), f"{tensor}self_attn.o_proj")
        yield from _norm(f"{name}.mlp_norm", hidden, f"{tensor}post_attention_layernorm", bias=False)
        yield from _gate_and_up(config, f"{name}.mlp", f"{tensor}mlp.")
        yield from _linear(f"{name}.mlp.down", (hidden, language.mlp_width), f"{tensor}mlp.down_proj")
    yield from _norm("llm.norm", hidden, "model.norm", bias=False)
    yield from _linear("llm.lm_head", vocabulary, "lm_head")


def _gate_and_up(config: FusionConfig, name: str, tensor: str) -> Iterator[Parameter]:
    """Yield two linears: Phi stores them as one matrix, Llama separately."""
    width, hidden = config.language.mlp_width, config.language.hidden_size
    for i, part in enumerate(("gate", "up")):
        if config.template == "phi_3":
            joint = f"{tensor}gate_up_proj.weight"
            source = Source(joint, (2 * width, hidden), row_range=(i * width, (i + 1) * width))
        else:
            source = Source(f"{tensor}{part}_proj.weight", (width, hidden))
        yield Parameter(f"{name}.{part}.weight", "linear", (width, hidden), (source,))


def _query_key_value(config: FusionConfig, name: str, tensor: str) -> Iterator[Parameter]:
    """Yield queries, keys and values as one linear; Llama's three parts differ in their number of rows."""
    language = config.language
    hidden, dim = language.hidden_size, language.head_dim
    rows = [heads * dim for heads in (language.heads, language.kv_heads, language.kv_heads)]
    if config.template == "phi_3":
        sources: tuple[Source, ...] = (Source(f"{tensor}qkv_proj.weight", (sum(rows), hidden)),)
    else:
        sources = tuple(Source(f"{tensor}{part}_proj.weight", (n, hidden)) for part, n in zip("qkv", rows, strict=True))
    yield Parameter(f"{name}.weight", "linear", (sum(rows), hidden), sources)
