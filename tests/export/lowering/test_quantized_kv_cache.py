"""Attention to an int8 cache that graphs only read, on ONNX Runtime, against NumPy and the eager interpreter."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backend_contract import HALF, LENGTH, Subject
from support.checkpoints import TINY, write_checkpoint
from support.opset24 import needs_opset_24
from torch import Tensor

from fusion_edge.benchmarks.acceptance.quantized_kv_cache_graph import dequantized, quantized, quantized_cache_attention
from fusion_edge.export import cli
from fusion_edge.export.engines.decompositions import use_attention
from fusion_edge.export.model.eager import KeyValueCache
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.bundle.graph_validation import LARGEST_FILE
from fusion_edge.runtime.bundle.graphs import cache_slots, cache_specs, token_alignment
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

Array = npt.NDArray[Any]
PARTS = "key", "value"
DIM = TINY.language.head_dim
UNUSED = 2**31 - 1
INT8_CACHE = 0.05
"""Tolerance between an int8 and a float cache, in standard deviations. The largest of 16 values is about twice their
root mean square, so a code rounds by 2 / 127 / sqrt(12) = 0.005 of it. Keys and values of two layers add up to 0.01,
and the largest of a thousand logits is four deviations; the rest is float16."""


@functools.cache
def attention_session(heads: int, kv_heads: int, is_built: bool) -> ort.InferenceSession:
    """Return the graph of a bundle, or what ``fusion-build`` makes of it: ONNX Runtime runs that only for prompts."""
    model = quantized_cache_attention(heads, kv_heads, DIM)
    if is_built:
        use_attention(model)
    assert any(node.op_type == "Attention" for node in model.graph.node) == is_built
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@needs_opset_24
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.sampled_from([1, 2]),
    is_step=st.booleans(),
    before=st.integers(0, 5),
    unused=st.integers(0, 3),
    behind=st.integers(0, 3),
    length=st.integers(1, 4),
    magnitude=st.sampled_from([0.0, 1e-5, 0.01, 1.0, 30.0]),
)
def test_attention_of_a_step_and_of_a_prompt(
    seed: int, groups: int, is_step: bool, before: int, unused: int, behind: int, length: int, magnitude: float
) -> None:
    """A step reads slots in front of unused ones and behind them, a prompt reads a prefix. Codes are equal.

    A prompt gives the same with the operator Attention in place of the function.
    """
    generator, kv_heads = np.random.default_rng(seed), 2
    session = attention_session(groups * kv_heads, kv_heads, is_built=False)

    def rows(count: int, heads: int) -> Array:
        return (magnitude * generator.normal(0, 1, (count, heads, DIM))).astype(np.float16)

    length = 1 if is_step else length
    used = (
        np.array([True] * before + [False] * unused + [True] * behind + [False]) if is_step else np.ones(before, bool)
    )
    # Scores have a deviation of about 1, whatever the magnitude of the keys.
    query = (generator.normal(0, 1, (length, groups * kv_heads, DIM)) / max(magnitude, 1)).astype(np.float16)
    new = {part: rows(length, kv_heads) for part in PARTS}
    past = {part: quantized(rows(len(used), kv_heads)) for part in PARTS}
    for codes, scales in past.values():  # what no run has read
        codes[~used], scales[~used] = generator.integers(-128, 128, codes[~used].shape), 60000
    start = int(used.sum())
    places = np.full(len(used), UNUSED)
    places[used] = np.arange(start)
    places[-1 if is_step else len(used) :] = start  # the slot that the step's own row gets
    feed: dict[str, Array] = {"positions": np.arange(start, start + length)[None]}
    feed |= {name: array.transpose(1, 0, 2)[None] for name, array in zip("qkv", (query, *new.values()), strict=True)}
    for way, is_read in (("slots", is_step), ("prefix", not is_step)):
        count = len(used) if is_read else 0
        feed[way] = places[:count]
        for part, (codes, scales) in past.items():
            feed |= {f"{way}.0.{part}": codes[:count], f"{way}.0.{part}_scale": scales[:count]}
    names = [output.name for output in session.get_outputs()]
    results: Any = session.run(None, feed)
    outputs: dict[str, Array] = dict(zip(names, results, strict=True))
    stored = {part: quantized(array) for part, array in new.items()}
    for part, (codes, scales) in stored.items():
        assert np.array_equal(outputs[f"new.0.{part}"], codes)
        assert np.array_equal(outputs[f"new.0.{part}_scale"], scales)
    keys, values = (
        np.concatenate([dequantized(*past[part])[used], dequantized(*stored[part])]).repeat(groups, axis=1)
        for part in PARTS
    )
    scores = np.einsum("lhd,thd->hlt", query.astype(np.float64), keys) / DIM**0.5
    scores = np.where(np.arange(start + length) <= np.arange(start, start + length)[:, None], scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hlt,thd->hld", shares / shares.sum(-1, keepdims=True), values)
    # A score is rounded relative to the sum of its products' magnitudes, and moves its share by as much.
    tolerance = 2e-3 * (1 + np.abs(scores[np.isfinite(scores)]).max()) * max(magnitude, 1e-6) * 4
    np.testing.assert_allclose(outputs["result"][0], expected, atol=tolerance)
    assert tolerance <= 0.1 * max(magnitude, 1e-5)
    if not is_step:
        built = attention_session(groups * kv_heads, kv_heads, is_built=True)
        for name, array in zip(names, built.run(None, feed), strict=True):
            np.testing.assert_allclose(array, outputs[name], atol=tolerance if name == "result" else 0)


# The whole LLM ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    options = ["--fp16", "--target=tensorrt", "--kv-cache=int8"]
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), *options]) == 0
    return open_bundle(folder)


def logits_of(subject: Subject) -> Floats:
    """Return the logits of a prompt, of one behind a prefix, and of steps behind each."""
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    found = []
    for prefix in (None, subject.prefix()[1]):
        found.append(subject.backend.prefill(rows, image, latents, questions, 200, prefix).copy())
        found += [subject.backend.decode(row).copy() for row in rows[:6]]
    return np.stack(found)


@needs_opset_24
def test_matches_the_eager_interpreter(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that quantizes in the same way, up to float16; with a float cache, up to the rounding to int8."""

    def eager() -> Floats:
        backend = EagerBackend(bundle.manifest.model, BundleWeights(bundle))
        return logits_of(Subject(backend, bundle.manifest, HALF))

    plain, extend = eager(), KeyValueCache.extend

    def rounded(x: Tensor) -> Tensor:
        codes, scales = quantized(x.half().numpy())
        return torch.from_numpy(dequantized(codes, scales).astype(np.float32))

    monkeypatch.setattr(KeyValueCache, "extend", lambda self, layer, k, v: extend(self, layer, rounded(k), rounded(v)))
    same = eager()
    actual = logits_of(Subject(OnnxRuntimeBackend(bundle, "cpu", 1, False), bundle.manifest, HALF))
    deviation = plain.std(-1, keepdims=True)
    errors = {name: np.abs(actual - expected) / deviation for name, expected in (("plain", plain), ("same", same))}
    assert errors["same"].max() <= HALF
    assert errors["plain"].max() <= INT8_CACHE
    assert errors["same"].mean() < errors["plain"].mean() / 1.5  # the rest is float16


@needs_opset_24
def test_a_prompt_is_its_steps(bundle: Bundle) -> None:
    """Logits do not depend on which tokens are prompt, prefix or steps."""
    subject = Subject(OnnxRuntimeBackend(bundle, "cpu", 1, False), bundle.manifest, HALF)
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    expected = subject.backend.prefill(rows, image, latents, questions, LENGTH).copy()
    steps = LENGTH - int(questions[0]) - 1
    assert steps > 5
    subject.backend.prefill(rows[:-steps], image, latents, questions, LENGTH)
    for row in rows[-steps:]:
        actual = subject.backend.decode(row).copy()
    subject.assert_close(actual, expected)


def test_a_graph_of_8b_is_small_enough(tmp_path: Path) -> None:
    """It has 32 layers. Graphs with more bytes than a limit are refused."""
    language = dataclasses.replace(TINY.language, layers=32)
    alignment = dataclasses.replace(TINY.alignment, layers=8, stride=4)
    config = dataclasses.replace(TINY, language=language, alignment=alignment)
    checkpoint = write_checkpoint(tmp_path / "FUSION-deep", config)
    options = ["--int8", "--target=tensorrt", "--kv-cache=int8"]
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "b"), *options]) == 0
    assert (tmp_path / "b/llm.onnx").stat().st_size < 0.9 * LARGEST_FILE


# Sizes -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5000))
def test_slots_of_a_cache(kv_heads: int, dim: int, tokens: int) -> None:
    """Every tensor has an aligned address at each multiple of the step, also of another layer behind all slots."""
    language = dataclasses.replace(TINY.language, kv_heads=kv_heads, head_dim=dim)
    specs = cache_specs(dataclasses.replace(TINY, language=language), "tensorrt", "int8")
    step, slots = token_alignment(specs), cache_slots(specs, tokens)
    assert step * kv_heads * 2 % 256 == step * kv_heads * dim % 256 == slots % step == 0
    assert tokens + step - 1 <= slots < tokens + 2 * step
    assert step <= 256
