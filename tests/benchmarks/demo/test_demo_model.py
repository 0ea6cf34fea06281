"""The trained demo model: export keeps its accuracy, and its interaction layers matter."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import DEMO_CHECKPOINT

from fusion_edge.benchmarks.demo.evaluate import WithoutAlignment, answerer, evaluate, held_out
from fusion_edge.export import cli
from fusion_edge.export.reference.eager_backend import open_checkpoint
from fusion_edge.runtime import Fusion, load

QUESTIONS = 200
QUERY_LENGTH = 4


def accuracy(fusion: Fusion) -> float:
    return evaluate(answerer(fusion, QUERY_LENGTH), held_out(QUESTIONS)).accuracy


@pytest.fixture(scope="module")
def reference() -> float:
    """Return the checkpoint's accuracy in the eager interpreter."""
    with open_checkpoint(DEMO_CHECKPOINT) as fusion:
        return accuracy(fusion)


def test_checkpoint_answers(reference: float) -> None:
    """The most frequent answer of each kind of question gives 0.44."""
    assert reference >= 0.97


def test_interaction_layers_matter(reference: float) -> None:
    with open_checkpoint(DEMO_CHECKPOINT, WithoutAlignment) as fusion:
        assert reference - accuracy(fusion) >= 0.40


@pytest.mark.parametrize(("precision", "largest_drop"), [("--fp32", 0.0), ("--int8", 0.01), ("--int4", 0.01)])
def test_bundles_answer_as_well(reference: float, precision: str, largest_drop: float, tmp_path: Path) -> None:
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(tmp_path / "b"), precision]) == 0
    with load(tmp_path / "b") as fusion:
        assert accuracy(fusion) >= reference - largest_drop
