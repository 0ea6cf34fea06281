"""What TensorRT-RTX does with a KV cache in 8 bits: docs/tensorrt.md relies on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks import kv_cache_formats
from fusion_edge.benchmarks.kv_cache_formats import MODELS, Result, layers, measured, moved_bytes, table
from fusion_edge.benchmarks.kv_cache_graphs import AS_BUILT, CAPACITY, FIRST, HALF, WINDOW, Heads, read_by_sums

HEADS = MODELS["8B"]
CACHE = HEADS.row * CAPACITY
"""Bytes of keys in 8 bits."""


@pytest.mark.parametrize(
    ("form", "caches"),
    [
        ("float16, TensorScatter", 4),
        ("FP8, Concat", 12),
        ("FP8, updated outside, Attention", 10),
        ("FP8, updated outside, products and sums", 2),
        (f"FP8, updated outside, products and sums{FIRST}", 2 * WINDOW / CAPACITY),
        (AS_BUILT, 2),
        (f"{AS_BUILT}{FIRST}", 2 * WINDOW / CAPACITY),
    ],
)
def test_moved_bytes(form: str, caches: float) -> None:
    """In caches of keys in 8 bits. Scores, attention weights and scales are the rest."""
    pytest.importorskip("tensorrt_rtx")
    moved = moved_bytes(form, HEADS, "12.0")
    assert isinstance(moved, int)
    assert caches * CACHE <= moved <= caches * (CACHE + 0.9e6)


def test_prompts_attend_with_a_fused_kernel() -> None:
    """With the form that ``--kv-cache int8`` builds; decode steps have no layer of it."""
    pytest.importorskip("tensorrt_rtx")
    found = layers(AS_BUILT, HEADS, "8.6")
    assert isinstance(found, list)
    assert [any("mha" in name for name in profile) for profile in found] == [True, False]


@pytest.mark.parametrize("kind", ["FP8", "INT8"])
def test_no_update_in_place_in_8_bits(kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = measured(f"{kind}, TensorScatter", "8.9")
    assert result.megabytes == {}
    assert result.refusal is not None
    assert "but must have type Float, Half, or BFloat16" in result.refusal


@needs_opset_24
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 4), st.integers(1, 3), st.integers(1, 2))
def test_products_and_sums_are_attention(seed: int, slots: int, prefix: int, positions: int, groups: int) -> None:
    """Of the tokens in both parts of the cache, and of the new ones."""
    generator, heads = np.random.default_rng(seed), Heads(2 * groups, 2, 4)
    query = generator.normal(0, 1, (1, heads.queries, positions, heads.dim)).astype(np.float16)
    counts = {"slots": slots, "prefix": prefix, "new": positions}
    values = {
        part: {name: generator.normal(0, 1, (2, count, heads.dim)).astype(np.float16) for name, count in counts.items()}
        for part in ("keys", "values")
    }
    total = slots + prefix + positions
    mask = np.arange(total) <= slots + prefix + np.arange(positions)[:, None]
    inputs: dict[str, npt.NDArray[Any]] = {"query": query, "mask": mask}
    for part, ways in values.items():
        inputs[f"new.{part}"] = ways["new"][None]
        inputs |= {f"{way}.{part}": by_token(ways[way]) for way in ("slots", "prefix")}
    keys, past = (np.concatenate([ways[name] for name in counts], 1, dtype=np.float64) for ways in values.values())
    grouped = query[0].reshape(2, groups, positions, heads.dim).astype(np.float64)
    scores = np.where(mask, grouped @ keys[:, None].transpose(0, 1, 3, 2), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    expected = shares / shares.sum(-1, keepdims=True) @ past[:, None]
    *stored, result = run(heads, inputs)
    np.testing.assert_allclose(result, expected, atol=2e-2)
    for rows, ways in zip(stored, values.values(), strict=True):
        assert np.array_equal(rows, by_token(ways["new"]))


def by_token(rows: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Return rows ``[heads,tokens,dim]`` as ``[tokens,heads*dim]``."""
    joined: npt.NDArray[np.float16] = rows.transpose(1, 0, 2).reshape(rows.shape[1], rows.shape[0] * rows.shape[2])
    return joined


def run(heads: Heads, inputs: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Compute the graph with ONNX Runtime."""
    import onnxruntime

    content = read_by_sums(heads, HALF).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    results: Any = session.run(None, inputs)
    return list(results)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(kv_cache_formats, "FORMS", {"a": None, "b": None})
    results = {"a": Result("a", {"3B": 16.8, "8B": 5.0}), "b": Result("b", {}, "too small")}
    monkeypatch.setattr(kv_cache_formats, "measured", lambda form, capability: results[form])
    assert kv_cache_formats.main(["--device=8.9", "--json", str(tmp_path / "f.json")]) == 0
    assert "| a | 16.8 MB | 5.0 MB |\n| b | refused: too small |\n" in capsys.readouterr().out
    facts = json.loads((tmp_path / "f.json").read_text())
    assert (facts["compute_capability"], facts["results"][0]["megabytes"]["3B"]) == ("8.9", 16.8)


def test_table() -> None:
    assert table([Result("a", {"3B": 1.5, "8B": 2.5})]).splitlines()[-1] == "| a | 1.5 MB | 2.5 MB |"
