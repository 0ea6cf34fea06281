"""Rotary frequencies from a ``config.json`` of any ``transformers`` release from 4.40 to 5.

Releases differ in where they write what: ``rope_scaling`` or, from 5 on, ``rope_parameters``, which then holds
``rope_theta`` and ``partial_rotary_factor`` too; the type as ``type`` or ``rope_type``, longrope at first as ``su``;
``original_max_position_embeddings`` inside or beside it. A null is a field left out. What is given twice must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusion_edge.export.checkpoint.json_fields import Fields

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
"""Fields by rope type: any other would change frequencies in a way that is not computed here."""


def read_rope(fields: Fields, head_dim: int) -> tuple[list[float], float]:
    """Inverse frequencies ``[head_dim/2]``, in radians a position, and the factor on cos and sin (FUSION.md section 5).

    ``fields`` is the whole ``config.json``. Raises :class:`FusionError` naming a field that has a wrong value, that
    contradicts another, or that is not understood.
    """
    ropes = [_inside(fields, name) for name in _PLACES if fields.data.get(name) is not None]
    places = [*ropes, fields]
    kind = _kind(ropes)
    for rope in ropes:
        for name, value in rope.data.items():
            if name not in _READ[kind] and value is not None:
                raise rope.wrong(name, f"no such field: with the rope type {kind!r} nothing here computes it")
    partial = _place("partial_rotary_factor", places)
    partial.one_of("partial_rotary_factor", (1.0, 1, None))
    theta = _place("rope_theta", places).number("rope_theta")
    if theta < 1:
        raise _place("rope_theta", places).wrong("rope_theta", "a number of at least 1")
    base = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "longrope":
        return _longrope(base, places)
    attention = _place("attention_factor", places)
    attention.one_of("attention_factor", (1.0, 1, None))
    return [_llama3(f, places) for f in base] if kind == "llama3" else base, 1.0


def _inside(fields: Fields, name: str) -> Fields:
    if not isinstance(fields.data[name], dict):
        raise fields.wrong(name, "an object or null")
    return fields.inner(name)


def _kind(ropes: Sequence[Fields]) -> str:
    """The rope type, by its present name."""
    found = None
    for rope in ropes:
        for name in ("rope_type", "type"):
            value = rope.data.get(name)
            if value is None:
                continue
            kind = _KINDS.get(value) if isinstance(value, str) else None
            if kind is None:
                raise rope.wrong(name, " or ".join(map(repr, _KINDS)))
            if found not in (None, kind):
                raise rope.wrong(name, f"{found!r}, the type that another field gives")
            found = kind
    return found or "default"


def _place(name: str, places: Sequence[Fields]) -> Fields:
    """The first of the places that gives a field, or the last if none does. All that give it must agree."""
    giving = [place for place in places if place.data.get(name) is not None]
    for other in giving[1:]:
        if other.data[name] != giving[0].data[name]:
            raise other.wrong(name, f"what {giving[0].prefix}{name} says, {giving[0].data[name]!r}")
    return giving[0] if giving else places[-1]


def _longrope(base: list[float], places: Sequence[Fields]) -> tuple[list[float], float]:
    """Frequencies divided by the short factors; the factor on cos and sin follows from the stretch if none is given."""
    fields = places[-1]
    original = _place("original_max_position_embeddings", places).integer("original_max_position_embeddings", minimum=2)
    if fields.integer("tokenizer_model_max_length") > original:
        raise fields.wrong(
            "tokenizer_model_max_length",
            f"at most original_max_position_embeddings ({original}), where longrope's short factors end",
        )
    short = _place("short_factor", places[:-1]).numbers("short_factor", len(base))
    frequencies = [f / s for f, s in zip(base, short, strict=True)]
    stretch = fields.integer("max_position_embeddings") / original
    factor = _place("factor", places[:-1])
    if factor.data.get("factor") is not None and not math.isclose(factor.number("factor"), stretch, rel_tol=1e-6):
        raise factor.wrong("factor", f"max_position_embeddings / original_max_position_embeddings, {stretch:g}")
    attention = _place("attention_factor", places)
    if attention.data.get("attention_factor") is not None:
        return frequencies, attention.number("attention_factor")
    return frequencies, 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))


def _llama3(frequency: float, places: Sequence[Fields]) -> float:
    """Llama 3.1's scaling of one inverse frequency: slow ones divided, a smooth ramp between."""
    *ropes, _ = places
    factor = _place("factor", ropes).number("factor")
    low, high = (_place(name, ropes).number(name) for name in ("low_freq_factor", "high_freq_factor"))
    original = _place("original_max_position_embeddings", places).integer("original_max_position_embeddings")
    if high <= low:
        raise _place("high_freq_factor", ropes).wrong("high_freq_factor", f"more than low_freq_factor ({low})")
    turns = original * frequency / (2 * math.pi)
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency
