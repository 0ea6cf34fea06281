"""Benchmarks of spinning threads and of memory pressure, briefly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion_edge.benchmarks import memory_pressure, spinning
from fusion_edge.benchmarks.rounds import percentiles

PARTS = ["load", "first prefill and step", "decode step alone", "decode step beside the reader"]


def test_spinning(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    options = ["--rounds=1", "--steps=3", "--questions=1", f"--json={output}"]
    assert spinning.main([str(tiny_bundle), *options]) == 0
    result = json.loads(output.read_text("utf-8"))
    assert result["command"] == "python -m fusion_edge.benchmarks.spinning BUNDLE --steps 3 --questions 1 --rounds 1"
    assert list(result["seconds"]) == ["quiet, spin", "quiet, sleep", "busy, spin", "busy, sleep"]
    for parts in result["seconds"].values():
        assert list(parts) == ["decode step", "question", "preprocessing"]
        assert all(0 < found["min"] <= found["p50"] <= found["p99"] for found in parts.values())
    assert "busy, sleep" in capsys.readouterr().out


def test_memory_pressure(tiny_bundle: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    output, log = tmp_path / "result.json", tmp_path / "log"
    log.write_bytes(bytes(10000))
    options = [str(tiny_bundle), "--rounds=1", "--steps=3", f"--log={log}", f"--json={output}"]
    assert memory_pressure.main(options) == 0
    result = json.loads(output.read_text("utf-8"))
    assert list(result["seconds"]) == ["mapped", "preload", "lock"]
    for parts in result["seconds"].values():
        assert list(parts) == PARTS
        assert all(0 < found["min"] <= found["p50"] <= found["p99"] for found in parts.values())
    log.write_bytes(b"")
    assert "The other process ended early; give it a file to read" in refused(memory_pressure.main, *options)


def test_percentiles() -> None:
    times = {"setting": {"part": [*range(200, 0, -1)]}}
    assert percentiles(times) == {"setting": {"part": {"min": 1, "p50": 100.5, "p99": 199}}}
