"""The eager interpreter: FUSION computed with torch.

It is the reference of every numerical test, trains the demo model, and runs calibration: a subclass that overrides
:meth:`EagerOperations.linear` observes the inputs of every linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_edge.export.model.operations import decomposed_self_attention
from fusion_edge.quant.formats import InputQuantization
from fusion_edge.quant.observer import fake_quantize
from fusion_edge.runtime.bundle.config import FusionConfig


class KeyValueCache:
    """Keys and values of every LLM layer, ``[B,kv_heads,L,head_dim]`` each."""

    def __init__(self, prefix: Mapping[int, tuple[Tensor, Tensor]] | None = None) -> None:
        """Start with the layers of ``prefix``, which do not change."""
        self.layers = dict(prefix or {})

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens. Returns all keys and values of the layer so far."""
        if layer in self.layers:
            before = self.layers[layer]
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        self.layers[layer] = keys, values
        return keys, values

    def rewind(self, length: int) -> None:
        """Drop the tokens after the first ``length``."""
        self.layers = {
            layer: (keys[:, :, :length], values[:, :, :length]) for layer, (keys, values) in self.layers.items()
        }


class EagerOperations:
    """Operations (``export/model/operations.py``) on torch tensors, differentiable, in the parameters' dtype."""

    def __init__(
        self,
        config: FusionConfig,
        get: Callable[[str], Tensor],
        cache: KeyValueCache | None = None,
        activation_quantization: Callable[[str], InputQuantization | None] | None = None,
    ) -> None:
        """``get`` returns the parameter of a name. Without a cache every call starts at position 0.

        ``activation_quantization`` returns the quantization of a linear's activations, None if they stay float.
        """
        self.config = config
        self.get = get
        self.cache = cache
        self.activation_quantization = activation_quantization

    def parameter(self, name: str) -> Tensor:
        return self.get(name)

    def linear(self, x: Tensor, name: str, bias: bool = False) -> Tensor:
        quantization = self.activation_quantization(name) if self.activation_quantization is not None else None
        x = x if quantization is None else fake_quantize(x, quantization)
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias") if bias else None)

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.get(f"{name}.weight"), self.get(f"{name}.bias"), eps)

    def add_layer_norm(self, x: Tensor, residual: Tensor, name: str, eps: float) -> Tensor:
        return self.layer_norm(x + residual, name, eps)

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return self.get(f"{name}.weight") * normed.to(x.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def gelu_mlp(self, x: Tensor, name: str) -> Tensor:
        hidden = self.linear(x, f"{name}.up", bias=True)
        return self.linear(F.gelu(hidden, approximate="tanh"), f"{name}.down", bias=True)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(parts), dim=axis)

    def split(self, x: Tensor, parts: int) -> Sequence[Tensor]:
        return x.chunk(parts, dim=-1)

    def unfold(self, pixels: Tensor, grid: int, patch: int) -> Tensor:
        used = pixels[:, :, : grid * patch, : grid * patch]
        blocks = used.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        return blocks.reshape(-1, grid * grid, 3 * patch * patch)

    def head_rows(self, x: Tensor, rows: int) -> Tensor:
        return x[:, :rows]

    def last_row(self, x: Tensor) -> Tensor:
        return x[:, -1]

    def mean_for_tail_rows(self, x: Tensor, rows: int) -> Tensor:
        return x.mean(1, keepdim=True).expand(-1, x.shape[1] - rows, -1)

    def key_mask(self, patches: Tensor, text_mask: Tensor) -> Tensor:
        return F.pad(text_mask.bool(), (patches.shape[1], 0), value=True)

    def self_attention(self, qkv: Tensor, heads: int, key_mask: Tensor, patches: int | None) -> Tensor:
        return decomposed_self_attention(self, qkv, heads, key_mask, patches)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, key_mask: Tensor) -> Tensor:
        def per_head(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

        mask = key_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(per_head(q), per_head(k), per_head(v), attn_mask=mask)
        return attended.transpose(1, 2).reshape(q.shape)

    def global_map(self, features: Tensor, grid: int) -> Tensor:
        width = features.shape[-1]
        crops = features.reshape(-1, 2, 2, grid, grid, width).transpose(2, 3)
        return crops.reshape(-1, 2 * grid, 2 * grid, width)

    def pool(self, image: Tensor, cells: Tensor) -> Tensor:
        rows = image[:, cells].amax(2)
        return rows[:, :, cells].amax(3)

    def windows(self, image: Tensor, window: int) -> Tensor:
        images, n, _, width = image.shape
        s = n // window
        cut = image.reshape(images, s, window, s, window, width).transpose(2, 3)
        return cut.reshape(images, s * s, window * window, width)

    def squeeze_window(self, windows: Tensor) -> Tensor:
        return windows.squeeze(2)

    def causal_attention(self, qkv: Tensor, layer: int) -> Tensor:
        batch, length, _ = qkv.shape
        q, k, v = self.heads(qkv, layer)
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v)
        past, mask = k.shape[2] - length, None
        if past and length > 1:
            mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(past)
        is_causal = past == 0 and length > 1
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)
        return attended.transpose(1, 2).reshape(batch, length, -1)

    def heads(self, qkv: Tensor, layer: int) -> list[Tensor]:
        """Split ``qkv`` of an LLM layer into queries, keys and values ``[B,heads,L,dim]``; rotate the first two."""
        language = self.config.language
        sizes = [n * language.head_dim for n in (language.heads, language.kv_heads, language.kv_heads)]
        q, k, v = (
            part.reshape(*part.shape[:-1], -1, language.head_dim).transpose(1, 2)
            for part in torch.split(qkv, sizes, dim=-1)
        )
        past = self.cache.layers[layer][0].shape[2] if self.cache and layer in self.cache.layers else 0
        positions = self.positions(past, q.shape[2]).to(q.device)
        return [self._rotate(q, positions), self._rotate(k, positions), v]

    def positions(self, past: int, length: int) -> Tensor:
        """Return the positions of ``length`` tokens after ``past`` others: ``[L]``, or ``[B,L]``."""
        return torch.arange(past, past + length)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply rotary embeddings to ``[B,heads,L,dim]``, rotating halves like Llama."""
        language = self.config.language
        frequencies = torch.tensor(language.rotary_inverse_frequencies, dtype=torch.float64, device=x.device)
        angles = (positions.double().unsqueeze(-1) * frequencies).unsqueeze(-3)
        cos = (angles.cos() * language.rotary_scale).to(x)
        sin = (angles.sin() * language.rotary_scale).to(x)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def if_any(self, positions: Tensor, then: Callable[[], Tensor], otherwise: Tensor) -> Tensor:
        return then() if positions.numel() else otherwise

    def take_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])[positions]

    def put_rows(self, x: Tensor, positions: Tensor, rows: Tensor, update: Tensor) -> Tensor:
        width = x.shape[-1]
        flat = x.reshape(-1, width).index_copy(0, positions.reshape(-1), (rows + update).reshape(-1, width))
        return flat.reshape(x.shape)

    def expand_questions(self, questions: Tensor) -> Tensor:
        return questions.unsqueeze(1)

    def layer(self, stacked: Tensor, index: int, layers: int) -> Tensor:
        return stacked.chunk(layers, dim=0)[index]

    def context_attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        dim = q.shape[-1] // heads
        q, k, v = (x.reshape(*x.shape[:-1], heads, dim) for x in (q, k, v))
        weights = ((q.unsqueeze(2) * k).sum(-1) / math.sqrt(dim)).softmax(2)
        return (weights.unsqueeze(-1) * v).sum(2).flatten(-2)
