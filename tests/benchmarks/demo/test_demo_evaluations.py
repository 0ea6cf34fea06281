"""Variants of ``fusion-eval`` for the demo: exact arithmetic as the reference, and a model without alignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusion_edge.benchmarks.demo import exact_arithmetic, without_alignment
from fusion_edge.benchmarks.demo.samples import SAMPLES, write_samples
from fusion_edge.benchmarks.evaluation import cli as evaluation
from fusion_edge.export import cli

OPTIONS = ("--max-new-tokens", "4", "--json")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    write_samples(tmp_path / "samples", 4, held_out=True)
    return tmp_path / "samples" / SAMPLES


def output(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_float_bundle_computes_its_weights(
    tiny_checkpoint: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--fp32"]) == 0
    capsys.readouterr()
    assert exact_arithmetic.main([str(tmp_path / "b"), str(samples), *OPTIONS]) == 0
    comparison = output(capsys)["comparison"]
    assert comparison["same_answer"]["share"] == 1
    assert comparison["kl_first_token"] < 1e-7  # float32 rounds differently in the two; INT4 weights give 1e-4


def test_interaction_layers_are_left_out(
    tiny_checkpoint: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert without_alignment.main([str(tiny_checkpoint), str(samples), *OPTIONS]) == 0
    without = output(capsys)
    assert evaluation.main([str(tiny_checkpoint), str(samples), *OPTIONS]) == 0
    confidences = [[case["confidence"] for case in result["cases"]] for result in (without, output(capsys))]
    assert all(one != other for one, other in zip(*confidences, strict=True))


def test_pictures_are_shared_by_their_questions(samples: Path) -> None:
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert {line["image"] for line in lines} == {"00000.png"}
    assert len({line["question"] for line in lines}) == 4
