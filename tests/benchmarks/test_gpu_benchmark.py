"""The GPU benchmark, run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusion_edge.benchmarks import gpu
from fusion_edge.benchmarks.latency.backend_stages import QUESTION_TOKENS, step_bytes
from fusion_edge.runtime.bundle.reader import open_bundle


def test_every_stage_is_measured(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = ["--bundle", str(tiny_bundle), "--device", "cpu", "--eager", "--steps", "3", "--json", str(file)]
    assert gpu.main(arguments) == 0
    text = capsys.readouterr().out
    assert "of the bandwidth roofline" in text
    result = json.loads(file.read_text())
    ours, eager = result["runs"]
    assert (ours["name"], eager["name"]) == ("onnxruntime-cpu", "eager")
    stages = ("encode_global", "alignment", "encode_local", "prefill", "decode_step")
    assert all(run[stage] > 0 for run in (ours, eager) for stage in stages)
    assert ours["ttft"] == pytest.approx(sum(ours[stage] for stage in stages[:-1]))
    assert result["decode_roofline_share"] == pytest.approx(result["decode_roofline_seconds"] / ours["decode_step"])


def test_decode_step_reads_the_llm_and_its_cache(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    language = manifest.model.language
    position = 2 * language.layers * language.kv_heads * language.head_dim * 4
    whole, prompt = step_bytes(manifest, manifest.max_context), step_bytes(manifest)
    typical = manifest.image_side**2 + manifest.query_lengths[0] + 2 * QUESTION_TOKENS
    assert whole - prompt == (manifest.max_context - typical) * position
    wide = replace(manifest, weights=dict.fromkeys(manifest.weights, "fp32"))
    llm = sum(
        language.hidden_size * outputs
        for outputs in (
            *(3 * language.hidden_size, language.hidden_size) * language.layers,
            *(3 * language.mlp_width,) * language.layers,
            language.vocab_size,
        )
    )
    assert step_bytes(wide, manifest.max_context) == 4 * llm + manifest.max_context * position
