"""Rooflines of Jetsons against numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion_edge.benchmarks import jetson_roofline
from fusion_edge.benchmarks.full_size_checkpoint import GOLDEN, LAYOUTS, write_checkpoint
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "3b"
    write_checkpoint(LAYOUTS["3b"], folder, GOLDEN / "FUSION-tiny-Phi", is_sparse=True)
    return folder


def test_rooflines_of_the_3b_layout(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert jetson_roofline.main([str(checkpoint), "--json"]) == 0
    nano, orin, thor = json.loads(capsys.readouterr().out)
    layers, width, mlp, rows = 32, 3072, 8192, 256 + 144 + 48
    weights = layers * (4 * width**2 + 3 * width * mlp)
    groups = weights // 128
    lm_head = 32064 * 2 * width
    cache = 2 * layers * width * 2 * 1536
    assert nano["step_bytes"] == pytest.approx(weights / 2 + 2 * groups + lm_head + cache, rel=1e-3)
    assert nano["decode_tokens_per_second"] == pytest.approx(102e9 / nano["step_bytes"])
    assert nano["fits"]
    # Mostly the LLM's GEMMs; the rest is the local crop, interaction layers and attention.
    gemms = 2 * rows * weights
    assert gemms < nano["question_operations"] < 1.4 * gemms
    # Four crops of 729 patches through a tower of 0.41 B weights, and keys and values of ten interaction layers.
    tower, pairs = 2 * 4 * 729 * 0.41e9, 2 * 9 * 144 * 30 * width**2
    assert nano["image_operations"] == pytest.approx(tower + pairs, rel=0.1)
    assert orin["image_operations"] == thor["image_operations"] == nano["image_operations"]
    assert orin["question_operations"] > nano["question_operations"]
    assert nano["ttft"] > orin["ttft"] > thor["ttft"] > thor["followup_ttft"] > 0


def test_smaller_context_reads_less(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert jetson_roofline.main([str(checkpoint), "--max-context", "1100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(jetson_roofline.MODULES)
    assert all(line.split("GB", 1)[0] for line in lines[1:])
    assert " 1100 " in lines[1]
    assert "2.50 GB" in lines[1]


def test_a_context_that_ends_before_the_answer(checkpoint: Path) -> None:
    """A step then reads the whole cache of 460 tokens; prompt and answer have 448 + 24."""
    nano = jetson_roofline.MODULES[0]
    with Checkpoint(checkpoint) as opened:
        short, longer = (jetson_roofline.jetson_estimate(opened, nano, context) for context in (460, 461))
    assert longer.step_bytes - short.step_bytes == 2 * 32 * 3072 * 2
