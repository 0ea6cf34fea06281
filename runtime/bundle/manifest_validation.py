"""Checks of the values in ``bundle.json``: ranges and consistency. :mod:`.schema` has checked their types."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np

from fusion_edge.runtime.bundle.config import (
    ALIGNMENT_HEADS,
    IMAGE_SIZE,
    VISION_HEADS,
    AlignmentConfig,
    FusionConfig,
    LanguageConfig,
)
from fusion_edge.runtime.bundle.graph_validation import PAGE
from fusion_edge.runtime.bundle.graphs import graph_specs
from fusion_edge.runtime.bundle.manifest import EMBEDDINGS, PRECISIONS, SCHEMA_VERSION, TARGETS, Manifest
from fusion_edge.runtime.bundle.templates import TEMPLATES

LARGEST = 2**31 - 1
"""Upper bound of a size: ONNX Runtime counts positions in int32."""
ACTIVATIONS = ("float32", "float16")
CACHES = (*ACTIVATIONS, "int8")
ACCURACY_LEVELS = range(5)


def check_values(manifest: Manifest) -> None:
    """Raise ``ValueError`` that names the first invalid value, as a part of a sentence."""
    model = manifest.model
    _one_of("schema_version", manifest.schema_version, (SCHEMA_VERSION,))
    _one_of("target", manifest.target, TARGETS)
    _one_of("precision", manifest.precision, PRECISIONS)
    _one_of("activations", manifest.activations, ACTIVATIONS)
    _one_of("cache", manifest.cache, CACHES)
    _one_of("accuracy_level", manifest.accuracy_level, ACCURACY_LEVELS)
    _check_model(model)
    _in_range("image_side", manifest.image_side, 1, model.vision.grid, "the vision grid's side")
    _in_range("max_context", manifest.max_context, 1, model.max_length, "the model's max_length")
    if not manifest.query_lengths or not set(manifest.query_lengths) <= set(model.alignment.query_lengths):
        raise ValueError(f"query_lengths are {list(manifest.query_lengths)[:20]}, not among the model's")
    _in_range("query_lengths[0]", manifest.query_lengths[0], 1, manifest.max_context, "max_context")
    if model.language.layers > len(manifest.weights):
        raise ValueError(f"model.language.layers is {model.language.layers}, more than there are weights")
    _check_files(manifest)
    _check_table(manifest)
    specs = {spec.name: spec for spec in graph_specs(model, manifest.target, manifest.activations, manifest.cache)}
    for name in specs.keys() | manifest.graphs.keys():
        if name not in specs or manifest.graphs.get(name) != specs[name].to_json():
            raise ValueError(
                f"graphs.{name[:40]} does not match the model's sizes, or is of another version of fusion-edge"
            )


def _check_model(model: FusionConfig) -> None:
    vision = model.vision
    _one_of("model.template", model.template, TEMPLATES)
    _in_range("model.max_length", model.max_length, 1)
    _in_range("model.vision.patch_size", vision.patch_size, 1, IMAGE_SIZE, "the crops' side")
    for name in ("width", "layers", "mlp_width"):
        _in_range(f"model.vision.{name}", getattr(vision, name), 1)
    _divides("model.vision.width", vision.width, VISION_HEADS)
    _check_language(model.language)
    _check_alignment(model.alignment, model.language.layers)
    if not model.eos_token_ids:
        raise ValueError("model.eos_token_ids is empty, so no answer would end")
    last = model.language.vocab_size - 1
    for name, ids in (("bos_token_id", (model.bos_token_id,)), ("eos_token_ids", model.eos_token_ids)):
        for token in ids:
            _in_range(f"model.{name}", token, 0, last, "the vocabulary's last id")


def _check_language(language: LanguageConfig) -> None:
    for name in ("hidden_size", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "vocab_size"):
        _in_range(f"model.language.{name}", getattr(language, name), 1)
    _divides("model.language.hidden_size", language.hidden_size, ALIGNMENT_HEADS)
    _divides("model.language.heads", language.heads, language.kv_heads)
    frequencies = language.rotary_inverse_frequencies
    if 2 * len(frequencies) != language.head_dim:
        raise ValueError(
            f"model.language.rotary_inverse_frequencies has {len(frequencies)} values for a head_dim of "
            f"{language.head_dim}"
        )
    numbers = {f"rotary_inverse_frequencies[{i}]": frequency for i, frequency in enumerate(frequencies)}
    numbers |= {"rotary_scale": language.rotary_scale, "norm_eps": language.norm_eps}
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"model.language.{name} is {number}, not a positive number")


def _check_alignment(alignment: AlignmentConfig, decoder_layers: int) -> None:
    for name, least in (("layers", 1), ("start", 0), ("stride", 1), ("window_size", 1)):
        _in_range(f"model.alignment.{name}", getattr(alignment, name), least)
    last = alignment.start + (alignment.layers - 1) * alignment.stride
    if last >= decoder_layers:
        raise ValueError(f"model.alignment has an interaction layer after LLM layer {last}, which does not exist")
    for length in alignment.query_lengths:
        _in_range("model.alignment.query_lengths", length, 1)
        if math.isqrt(length) ** 2 != length:
            raise ValueError(f"model.alignment.query_lengths has {length}, not a square number")


def _check_files(manifest: Manifest) -> None:
    """Check sizes, checksums and the syntax of paths. Opening the bundle checks where the paths lead."""
    paths: set[str] = set()
    for number, entry in enumerate(manifest.files):
        if entry.path in paths:
            raise ValueError(f"files[{number}].path is {entry.path[:80]!r}, which is listed twice")
        paths.add(entry.path)
        if str(PurePosixPath(entry.path)) != entry.path:
            raise ValueError(f"files[{number}].path is {entry.path[:80]!r}, not a plain path")
        _in_range(f"files[{number}].size", entry.size, 0, 2**63 - 1)
        if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise ValueError(f"files[{number}].sha256 is {entry.sha256[:80]!r}, not 64 hexadecimal digits")


def _check_table(manifest: Manifest) -> None:
    """Check that each part of the token table starts on a page, after the part before it, and ends in the file."""
    language = manifest.model.language
    size = next((entry.size for entry in manifest.files if entry.path == EMBEDDINGS), None)
    free = 0
    for part in manifest.embedding.parts(language.vocab_size, language.hidden_size):
        end = part.offset + math.prod(part.shape) * np.dtype(part.dtype).itemsize
        if part.offset < free or part.offset % PAGE or (size is not None and end > size):
            raise ValueError(f"embedding is at bytes {part.offset} to {end} of a file of {size} bytes"[:200])
        free = end


def _one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, not {' or '.join(map(str, allowed))}"[:200])


def _in_range(name: str, value: int, least: int, most: int = LARGEST, limit: str = "") -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]}, not {least} to {most}{limit and f', {limit}'}")


def _divides(name: str, value: int, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} is {value}, not a multiple of {divisor}")
