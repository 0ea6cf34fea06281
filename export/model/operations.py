"""The operations that FUSION is written in. Every interpreter implements all of them.

Parameters are given by name, a path in the model (``checkpoint/tensor_mapping.py``). An interpreter computes with the
weight, observes its inputs, or plans its place in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self  # comes with the type checker; typing has it from Python 3.11 on


class Value(Protocol):
    """An array of an interpreter: a torch tensor, or the name of an ONNX value."""

    def __add__(self, other: Self, /) -> Self: ...


T = TypeVar("T", bound=Value)


class Operations(Protocol[T]):
    """Interface of an interpreter. Letters in shapes are those of :mod:`fusion_edge.export.model.architecture`."""

    def parameter(self, name: str) -> T:
        """Return a parameter of kind ``float``."""
        ...

    def linear(self, x: T, name: str, bias: bool = False) -> T:
        """Compute ``x @ weight.T (+ bias)`` with ``{name}.weight`` and ``{name}.bias``: ``[...,K]`` -> ``[...,N]``."""
        ...

    def layer_norm(self, x: T, name: str, eps: float) -> T:
        """Apply LayerNorm with weight and bias over the last axis."""
        ...

    def add_layer_norm(self, x: T, residual: T, name: str, eps: float) -> T:
        """Apply LayerNorm to ``x + residual``."""
        ...

    def rms_norm(self, x: T, name: str, eps: float) -> T:
        """Apply RMSNorm over the last axis, computed in float32."""
        ...

    def gelu(self, x: T) -> T:
        """Apply the exact GELU (erf)."""
        ...

    def gelu_mlp(self, x: T, name: str) -> T:
        """Apply linear ``{name}.up``, GELU (tanh approximation) and linear ``{name}.down``, both with bias."""
        ...

    def swiglu(self, gate: T, up: T) -> T:
        """Compute ``gate * sigmoid(gate) * up``."""
        ...

    def scale(self, x: T, factor: float) -> T:
        """Compute ``x * factor``."""
        ...

    def concat(self, parts: Sequence[T], axis: int) -> T:
        """Concatenate along ``axis``; parts may be empty along it."""
        ...

    def split(self, x: T, parts: int) -> Sequence[T]:
        """Split the last axis into equal parts."""
        ...

    def unfold(self, pixels: T, grid: int, patch: int) -> T:
        """Cut into non-overlapping patches: ``[N,3,S,S]`` -> ``[N,grid*grid,3*patch*patch]``; the rest is dropped."""
        ...

    def head_rows(self, x: T, rows: int) -> T:
        """Return the first ``rows`` of axis 1."""
        ...

    def last_row(self, x: T) -> T:
        """Return the last token's row: ``[B,L,D]`` -> ``[B,D]``."""
        ...

    def mean_for_tail_rows(self, x: T, rows: int) -> T:
        """Return the mean over axis 1 for each row after the first ``rows``: ``[N,rows+T,W]`` -> ``[N,T,W]``."""
        ...

    def key_mask(self, patches: T, text_mask: T) -> T:
        """Return the attention mask ``[N,P+T]``: true for patches, ``text_mask`` (1 or 0) for text."""
        ...

    def self_attention(self, qkv: T, heads: int, key_mask: T, patches: int | None) -> T:
        """Compute self-attention: ``[N,L,3W]``, mask ``[N,L]`` -> ``[N,L,W]``.

        If ``patches`` is given, only the first ``patches`` rows attend; the others become the mean of all values.
        """
        ...

    def attention(self, q: T, k: T, v: T, heads: int, key_mask: T) -> T:
        """Compute multi-head attention, scaled by 1/sqrt(width/heads): ``[N,Q,W]``, ``[N,K,W]`` -> ``[N,Q,W]``."""
        ...

    def global_map(self, features: T, grid: int) -> T:
        """Join the four crops of an image: ``[4B,P,D]`` -> ``[B,2*grid,2*grid,D]``."""
        ...

    def pool(self, image: T, cells: T) -> T:
        """Max-pool both image axes adaptively: ``[B,M,M,D]`` with cells ``[n,m]`` -> ``[B,n,n,D]``."""
        ...

    def windows(self, image: T, window: int) -> T:
        """Cut into windows: ``[B,n,n,D]`` -> ``[B,(n/window)^2,window^2,D]``, row-major in and across windows."""
        ...

    def squeeze_window(self, windows: T) -> T:
        """Drop the axis of size 1: ``[B,q,1,D]`` -> ``[B,q,D]``."""
        ...

    def causal_attention(self, qkv: T, layer: int) -> T:
        """Compute causal grouped-query attention of an LLM layer, with rotary embeddings and the KV cache."""
        ...

    def if_any(self, positions: T, then: Callable[[], T], otherwise: T) -> T:
        """Return ``then()`` if ``positions`` has elements; otherwise ``otherwise``, without computing ``then()``."""
        ...

    def take_rows(self, x: T, positions: T) -> T:
        """Gather rows of the flattened ``[B*L,D]``: positions ``[...]`` -> ``[...,D]``."""
        ...

    def put_rows(self, x: T, positions: T, rows: T, update: T) -> T:
        """Return ``x`` with the rows at ``positions`` replaced by ``rows + update``."""
        ...

    def expand_questions(self, questions: T) -> T:
        """Add an axis to broadcast over a question's latents: ``[R,D]`` -> ``[R,1,D]``."""
        ...

    def layer(self, stacked: T, index: int, layers: int) -> T:
        """Return part ``index`` of ``layers`` equal parts of axis 0."""
        ...

    def context_attention(self, q: T, k: T, v: T, heads: int) -> T:
        """Attend from each latent to its own nine rows: ``[R,q,D]``, ``[R or 1,q,9,D]`` -> ``[R,q,D]`` (section 5)."""
        ...


def decomposed_self_attention(ops: Operations[T], qkv: T, heads: int, key_mask: T, patches: int | None) -> T:
    """Compute :meth:`Operations.self_attention` from other operations."""
    q, k, v = ops.split(qkv, 3)
    if patches is None:
        return ops.attention(q, k, v, heads, key_mask)
    attended = ops.attention(ops.head_rows(q, patches), k, v, heads, key_mask)
    return ops.concat([attended, ops.mean_for_tail_rows(v, patches)], axis=1)
