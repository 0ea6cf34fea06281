"""What a bundle needs at the least: bytes that a one-token step reads, multiply-adds of a prompt."""

from __future__ import annotations

import math

import numpy as np

from fusion_edge.benchmarks.latency.result import Case, Limit, Limits, Rates
from fusion_edge.export.checkpoint.tensor_mapping import parameters
from fusion_edge.quant.bit_allocation import stored_bits
from fusion_edge.quant.formats import STORED_GROUP_SIZES, WeightFormat
from fusion_edge.quant.policy import EMBEDDING
from fusion_edge.runtime.bundle.manifest import Manifest

HEAD = "llm.lm_head"
OF_QUESTION = "question_in"  # the linear of an interaction layer that has one row a question
OF_IMAGE = ("context", "key", "value")  # those that the alignment decoder has


def limits(manifest: Manifest, case: Case, positions: int, rates: Rates, step: float, prefill: float) -> Limits:
    """Beside the medians of a step and of a prefill, in seconds; a step reads so many positions of the cache."""
    return Limits(
        step=_limit(weight_bytes(manifest) + cache_bytes(manifest, positions), rates.bandwidth, step),
        prefill=_limit(prefill_multiplications(manifest, case), rates.multiplications, prefill),
    )


def _limit(needed: int, rate: float | None, seconds: float) -> Limit:
    return Limit(needed, None, None) if rate is None else Limit(needed, needed / rate, needed / rate / seconds)


def weight_bytes(manifest: Manifest) -> int:
    """Of the LLM's linears as they are stored, scales included: a step reads each once."""
    bits = 0
    for name, (rows, inputs) in _shapes(manifest).items():
        if name.startswith("llm."):
            form = WeightFormat.parse(manifest.weights[name], sizes=STORED_GROUP_SIZES)
            bits += stored_bits((rows, inputs), form) if form.is_quantized else rows * inputs * form.bits
    return bits // 8


def cache_bytes(manifest: Manifest, positions: int) -> int:
    """Of the KV cache, all of which a step reads up to its own position; with TensorRT as long as it was built."""
    return manifest.model.language.cache_values * np.dtype(manifest.cache).itemsize * positions


def prefill_multiplications(manifest: Manifest, case: Case) -> int:
    """Multiply-adds of a prompt: every linear for its rows, scores and sums of causal attention."""
    language, length = manifest.model.language, case.prompt_tokens
    total = language.layers * language.heads * language.head_dim * length * (length + 1)
    for name, (rows, inputs) in _shapes(manifest).items():
        total += rows * inputs * _rows(name, case)
    return total


def _rows(name: str, case: Case) -> int:
    """How many rows of a prompt go through a linear."""
    part = name.rpartition(".")[2]
    if name.startswith("alignment."):
        return 0 if part in OF_IMAGE else 1 if part == OF_QUESTION else case.query_length
    if not name.startswith("llm."):
        return 0
    return 1 if name == HEAD else case.prompt_tokens


def _shapes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear of a bundle, the token table left out."""
    shapes = {p.linear: p.shape for p in parameters(manifest.model).values() if p.kind != "float"}
    return {name: (shapes[name][0], math.prod(shapes[name][1:])) for name in manifest.weights if name != EMBEDDING}
