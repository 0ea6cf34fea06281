"""What TensorRT-RTX does with a KV cache in 8 bits: docs/tensorrt.md relies on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_edge.benchmarks import kv_cache_formats
from fusion_edge.benchmarks.kv_cache_formats import CAPACITY, DIM, KV_HEADS, Result, measured, table

CACHE = KV_HEADS * CAPACITY * DIM / 1e6
"""Megabytes of keys in 8 bits."""


@pytest.mark.parametrize(
    ("form", "caches"),
    [
        ("float16, TensorScatter", 4),
        ("FP8, Concat", 12),
        ("FP8, cache updated outside of the engine, products of FP8", 2),
    ],
)
def test_moved_bytes(form: str, caches: int) -> None:
    """In caches of keys in 8 bits. Scores of the last form are the rest: 1.2 MB."""
    pytest.importorskip("tensorrt_rtx")
    result = measured(form, "12.0")
    assert result.megabytes is not None
    assert caches * CACHE <= result.megabytes <= caches * CACHE + 1.3


@pytest.mark.parametrize("kind", ["FP8", "INT8"])
def test_no_update_in_place_in_8_bits(kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = measured(f"{kind}, TensorScatter", "8.9")
    assert result.megabytes is None
    assert result.refusal is not None
    assert "but must have type Float, Half, or BFloat16" in result.refusal


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(kv_cache_formats, "FORMS", {"a": None, "b": None})
    results = {"a": Result("a", 16.8), "b": Result("b", None, "too small")}
    monkeypatch.setattr(kv_cache_formats, "measured", lambda form, capability: results[form])
    assert kv_cache_formats.main(["--device=8.9", "--json", str(tmp_path / "f.json")]) == 0
    assert "| a | 16.8 MB |\n| b | refused: too small |\n" in capsys.readouterr().out
    facts = json.loads((tmp_path / "f.json").read_text())
    assert (facts["compute_capability"], facts["results"][0]["megabytes"]) == ("8.9", 16.8)


def test_table() -> None:
    assert table([Result("a", 1.5)]).splitlines()[-1] == "| a | 1.5 MB |"
