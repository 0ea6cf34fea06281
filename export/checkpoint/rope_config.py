"""Compute rotary frequencies from ``config.json``, as ``transformers`` 4.40 to 5 write it.

Releases differ in where they write a field: ``rope_scaling`` or, since 5, ``rope_parameters``, which also holds
``rope_theta`` and ``partial_rotary_factor``; the type as ``type`` or ``rope_type``, longrope first as ``su``;
``original_max_position_embeddings`` inside or beside it. Null means missing. Values given twice must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusion_edge.export.checkpoint.json_fields import JsonFields

_PLACES = ("rope_parameters", "rope_scaling")
_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "llama3": "llama3"}
_COMMON = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "attention_factor",
}
_READ = {
    "default": _COMMON,
    "longrope": _COMMON | {"factor", "short_factor", "long_factor"},
    "llama3": _COMMON | {"factor", "low_freq_factor", "high_freq_factor"},
}
"""Supported fields by rope type. Others would change the frequencies."""


def read_rope(fields: JsonFields, head_dim: int) -> tuple[list[float], float]:
    """Return inverse frequencies ``[head_dim/2]`` in radians per position, and the scale of cos and sin.

    ``fields`` is the whole ``config.json``. See docs/fusion-model.md section 5. Raises :class:`FusionError` naming a
    field that is invalid, unsupported, or contradicts another.
    """
    ropes = [_inside(fields, name) for name in _PLACES if fields.data.get(name) is not None]
    places = [*ropes, fields]
    kind = _kind(ropes)
    for rope in ropes:
        for name, value in rope.data.items():
            if name not in _READ[kind] and value is not None:
                raise rope.invalid(name, f"null: rope type {kind!r} does not support it")
    partial = _place("partial_rotary_factor", places)
    partial.one_of("partial_rotary_factor", (1.0, 1, None))
    theta = _place("rope_theta", places).number("rope_theta")
    if theta < 1:
        raise _place("rope_theta", places).invalid("rope_theta", "a number of at least 1")
    base = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "longrope":
        return _longrope(base, places)
    attention = _place("attention_factor", places)
    attention.one_of("attention_factor", (1.0, 1, None))
    return [_llama3(f, places) for f in base] if kind == "llama3" else base, 1.0


def _inside(fields: JsonFields, name: str) -> JsonFields:
    if not isinstance(fields.data[name], dict):
        raise fields.invalid(name, "an object or null")
    return fields.inner(name)


def _kind(ropes: Sequence[JsonFields]) -> str:
    """Return the rope type by its current name."""
    found = None
    for rope in ropes:
        for name in ("rope_type", "type"):
            value = rope.data.get(name)
            if value is None:
                continue
            kind = _KINDS.get(value) if isinstance(value, str) else None
            if kind is None:
                raise rope.invalid(name, " or ".join(map(repr, _KINDS)))
            if found not in (None, kind):
                raise rope.invalid(name, f"{found!r}, as another field says")
            found = kind
    return found or "default"


def _place(name: str, places: Sequence[JsonFields]) -> JsonFields:
    """Return the first place that has a field, or the last if none has. All places that have it must agree."""
    giving = [place for place in places if place.data.get(name) is not None]
    for other in giving[1:]:
        if other.data[name] != giving[0].data[name]:
            raise other.invalid(name, f"the value of {giving[0].prefix}{name}, {giving[0].data[name]!r}")
    return giving[0] if giving else places[-1]


def _longrope(base: list[float], places: Sequence[JsonFields]) -> tuple[list[float], float]:
    """Divide frequencies by the short factors. The scale follows from the context's extension if none is given."""
    fields = places[-1]
    original = _place("original_max_position_embeddings", places).integer("original_max_position_embeddings", minimum=2)
    if fields.integer("tokenizer_model_max_length") > original:
        raise fields.invalid(
            "tokenizer_model_max_length",
            f"at most original_max_position_embeddings ({original}), the limit of longrope's short factors",
        )
    short = _place("short_factor", places[:-1]).numbers("short_factor", len(base))
    frequencies = [f / s for f, s in zip(base, short, strict=True)]
    extension = fields.integer("max_position_embeddings") / original
    factor = _place("factor", places[:-1])
    if factor.data.get("factor") is not None and not math.isclose(factor.number("factor"), extension, rel_tol=1e-6):
        raise factor.invalid("factor", f"max_position_embeddings / original_max_position_embeddings, {extension:g}")
    attention = _place("attention_factor", places)
    if attention.data.get("attention_factor") is not None:
        return frequencies, attention.number("attention_factor")
    return frequencies, 1.0 if extension <= 1 else math.sqrt(1 + math.log(extension) / math.log(original))


def _llama3(frequency: float, places: Sequence[JsonFields]) -> float:
    """Scale an inverse frequency as Llama 3.1: low ones are divided by a factor, with a smooth ramp to high ones."""
    *ropes, _ = places
    factor = _place("factor", ropes).number("factor")
    low, high = (_place(name, ropes).number(name) for name in ("low_freq_factor", "high_freq_factor"))
    original = _place("original_max_position_embeddings", places).integer("original_max_position_embeddings")
    if high <= low:
        raise _place("high_freq_factor", ropes).invalid("high_freq_factor", f"more than low_freq_factor ({low})")
    turns = original * frequency / (2 * math.pi)
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency
