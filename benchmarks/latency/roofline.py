"""Work of a bundle, in bytes per decode step and multiply-adds per prefill, against the rooflines of a device."""

from __future__ import annotations

import math

from fusion_edge.benchmarks.latency.result import Case, Peaks, RooflineUse, Utilization
from fusion_edge.export.checkpoint.tensor_mapping import parameters
from fusion_edge.export.planning.rules import EMBEDDING
from fusion_edge.quant.bit_allocation import stored_bytes
from fusion_edge.quant.formats import STORED_GROUP_SIZES, WeightFormat
from fusion_edge.runtime.bundle.manifest import Manifest

HEAD = "llm.lm_head"
QUESTION_LINEAR = "question_in"
"""Linear of an interaction layer that runs on one token, the question's last."""
TEXT_PROJECTOR = "vision.text_projector."
CONTEXT_LINEARS = ("context", "key", "value")
"""Linears of an interaction layer that the alignment decoder runs."""


def roofline_use(
    manifest: Manifest, case: Case, cached_tokens: int, peaks: Peaks, decode_seconds: float, prefill_seconds: float
) -> RooflineUse:
    """Compare the medians of a decode step and of a prefill with the rooflines.

    ``cached_tokens``: number of tokens of the KV cache that a decode step reads.
    """
    decode_work = weight_bytes(manifest) + cache_bytes(manifest, cached_tokens)
    return RooflineUse(
        decode=_utilization(decode_work, peaks.bandwidth, decode_seconds),
        prefill=_utilization(prefill_macs(manifest, case), peaks.compute, prefill_seconds),
    )


def _utilization(work: int, peak: float | None, seconds: float) -> Utilization:
    return Utilization(work, None, None) if peak is None else Utilization(work, work / peak, work / peak / seconds)


def weight_bytes(manifest: Manifest) -> int:
    """Return the stored bytes of the LLM's linears, scales included: a decode step reads each once."""
    return sum(
        stored_bytes(shape, WeightFormat.parse(manifest.weights[name], sizes=STORED_GROUP_SIZES), manifest.target)
        for name, shape in _shapes(manifest).items()
        if name.startswith("llm.")
    )


def cache_bytes(manifest: Manifest, tokens: int) -> int:
    """Return the bytes of ``tokens`` tokens of the KV cache."""
    return manifest.cache_token_bytes * tokens


def prefill_macs(manifest: Manifest, case: Case) -> int:
    """Return the multiply-adds of a prompt: all linears for their tokens, and causal attention."""
    language, length = manifest.model.language, case.prompt_tokens
    total = language.layers * language.heads * language.head_dim * length * (length + 1)
    for name, (rows, inputs) in _shapes(manifest).items():
        total += rows * inputs * _tokens(name, case)
    return total


def encoder_macs(manifest: Manifest, crops: int) -> int:
    """Return the multiply-adds of the vision encoder for crops without text: all linears, and attention."""
    vision = manifest.model.vision
    linears = sum(
        math.prod(shape)
        for name, shape in _shapes(manifest).items()
        if name.startswith("vision.") and not name.startswith(TEXT_PROJECTOR)
    )
    attention = 2 * vision.layers * vision.patches * vision.width
    return crops * vision.patches * (linears + attention)


def _tokens(name: str, case: Case) -> int:
    """Return the number of tokens of a prompt that go through a linear."""
    part = name.rpartition(".")[2]
    if name.startswith("alignment."):
        return 0 if part in CONTEXT_LINEARS else 1 if part == QUESTION_LINEAR else case.query_length
    if not name.startswith("llm."):
        return 0
    return 1 if name == HEAD else case.prompt_tokens


def _shapes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of every linear of a bundle, without the embedding table."""
    shapes = {p.linear: p.shape for p in parameters(manifest.model).values() if p.kind != "float"}
    return {name: (shapes[name][0], math.prod(shapes[name][1:])) for name in manifest.weights if name != EMBEDDING}
