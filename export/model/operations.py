"""The small set of operations that FUSION is written in; every interpreter implements exactly these.

Names of parameters are paths of the model (``checkpoint/tensor_mapping.py``); weights never appear as values, so an
interpreter is free to compute with them, to watch them, or to write down where they will be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self  # of the type checker; typing has it from Python 3.11


class Value(Protocol):
    """An array of some interpreter: a torch tensor, or the name of an ONNX value."""

    def __add__(self, other: Self, /) -> Self: ...


T = TypeVar("T", bound=Value)


class Operations(Protocol[T]):
    """What an interpreter must offer. Shapes use the letters of :mod:`fusion_edge.export.model.architecture`."""

    def parameter(self, name: str) -> T:
        """The array of a ``float`` parameter."""
        ...

    def linear(self, x: T, name: str, bias: bool = False) -> T:
        """``x @ weight.T (+ bias)`` with ``{name}.weight`` and ``{name}.bias``: ``[...,K]`` -> ``[...,N]``."""
        ...

    def layer_norm(self, x: T, name: str, eps: float) -> T:
        """LayerNorm over the last axis with weight and bias."""
        ...

    def add_layer_norm(self, x: T, residual: T, name: str, eps: float) -> T:
        """LayerNorm of ``x + residual``."""
        ...

    def rms_norm(self, x: T, name: str, eps: float) -> T:
        """RMSNorm over the last axis, computed in float32."""
        ...

    def gelu(self, x: T) -> T:
        """Exact GELU (erf)."""
        ...

    def gelu_mlp(self, x: T, name: str) -> T:
        """Linear ``{name}.down`` of the GELU, tanh approximation, of linear ``{name}.up``; both with bias."""
        ...

    def swiglu(self, gate: T, up: T) -> T:
        """``gate * sigmoid(gate) * up``."""
        ...

    def scale(self, x: T, factor: float) -> T:
        """``x * factor``."""
        ...

    def concat(self, parts: Sequence[T], axis: int) -> T:
        """Concatenation along ``axis``; parts may be empty along it."""
        ...

    def split(self, x: T, parts: int) -> Sequence[T]:
        """Equal parts of the last axis."""
        ...

    def unfold(self, pixels: T, grid: int, patch: int) -> T:
        """Non-overlapping patches: ``[N,3,S,S]`` -> ``[N,grid*grid,3*patch*patch]``; the rest is cut off."""
        ...

    def head_rows(self, x: T, rows: int) -> T:
        """The first ``rows`` of axis 1."""
        ...

    def last_row(self, x: T) -> T:
        """``[B,L,D]`` -> ``[B,D]``: the last position."""
        ...

    def mean_for_tail_rows(self, x: T, rows: int) -> T:
        """The mean over all of axis 1, repeated for each row behind the first ``rows``: -> ``[N,T,W]``."""
        ...

    def key_mask(self, patches: T, text_mask: T) -> T:
        """``[N,P+T]``, true where a row may be attended to: every patch, and text by ``text_mask`` (1 or 0)."""
        ...

    def self_attention(self, qkv: T, heads: int, key_mask: T, patches: int | None) -> T:
        """Attention of rows among themselves: ``[N,L,3W]``, mask ``[N,L]`` -> ``[N,L,W]``.

        With ``patches`` only so many first rows attend, and the others become the mean of all values.
        """
        ...

    def attention(self, q: T, k: T, v: T, heads: int, key_mask: T) -> T:
        """Multi-head attention, scale 1/sqrt(width/heads): ``[N,Q,W]``, ``[N,K,W]`` -> ``[N,Q,W]``."""
        ...

    def global_map(self, features: T, grid: int) -> T:
        """Four crops put back in place: ``[4B,P,D]`` -> ``[B,2*grid,2*grid,D]``."""
        ...

    def pool(self, image: T, cells: T) -> T:
        """Adaptive max pool of both image axes: ``[B,M,M,D]`` with cells ``[n,m]`` -> ``[B,n,n,D]``."""
        ...

    def windows(self, image: T, window: int) -> T:
        """``[B,n,n,D]`` -> ``[B,(n/window)^2,window^2,D]``, row-major in and across windows."""
        ...

    def squeeze_window(self, windows: T) -> T:
        """``[B,q,1,D]`` -> ``[B,q,D]``."""
        ...

    def causal_attention(self, qkv: T, layer: int) -> T:
        """Rotary, causal, grouped-query self-attention of an LLM layer, with its KV cache where there is one."""
        ...

    def if_any(self, positions: T, then: Callable[[], T], otherwise: T) -> T:
        """``then()`` where ``positions`` has elements; else ``otherwise``, of the same shape, without computing it."""
        ...

    def take_rows(self, x: T, positions: T) -> T:
        """Rows of the flattened ``[B*L,D]``: positions ``[...]`` -> ``[...,D]``."""
        ...

    def put_rows(self, x: T, positions: T, rows: T, update: T) -> T:
        """``x`` with the rows at ``positions`` replaced by ``rows + update``."""
        ...

    def expand_questions(self, questions: T) -> T:
        """``[R,D]`` -> ``[R,1,D]``, to be broadcast over a question's latents."""
        ...

    def layer(self, stacked: T, index: int, layers: int) -> T:
        """Part ``index`` of ``layers`` equal parts of axis 0."""
        ...

    def context_attention(self, q: T, k: T, v: T, heads: int) -> T:
        """Every latent over its own nine rows: ``[R,q,D]``, ``[R or 1,q,9,D]`` -> ``[R,q,D]`` (section 5)."""
        ...


def self_attention_by_parts(ops: Operations[T], qkv: T, heads: int, key_mask: T, patches: int | None) -> T:
    """:meth:`Operations.self_attention` of other operations."""
    q, k, v = ops.split(qkv, 3)
    if patches is None:
        return ops.attention(q, k, v, heads, key_mask)
    attended = ops.attention(ops.head_rows(q, patches), k, v, heads, key_mask)
    return ops.concat([attended, ops.mean_for_tail_rows(v, patches)], axis=1)
