"""Comparison of weight formats, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_edge.benchmarks import cpu_kernels, weight_formats


def test_all_formats_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_kernels, "DECODE_LAYERS", 2)
    output = tmp_path / "result.json"
    sizes = {"outputs": 256, "inputs": 256, "rows": 4}
    assert weight_formats.main([f"--{name}={size}" for name, size in sizes.items()] + ["--json", str(output)]) == 0
    result = json.loads(output.read_text("utf-8"))
    assert {name: result[name] for name in sizes} == sizes
    assert list(result["gemv_seconds"]) == list(result["gemm_seconds"])
    assert list(result["gemv_seconds"])[:3] == [
        "nf4:64, ONNX Runtime",
        "int4:128, ONNX Runtime",
        "int4:32, ONNX Runtime",
    ]
    assert all(seconds > 0 for part in ("gemv_seconds", "gemm_seconds") for seconds in result[part].values())
    assert "GOP/s" in capsys.readouterr().out
