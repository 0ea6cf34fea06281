"""The trained demo model: quality survives the export, and the interaction layers carry information."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion_edge.benchmarks.demo.evaluate import EagerAnswerer, evaluate, held_out
from fusion_edge.export import cli
from fusion_edge.runtime import load

CHECKPOINT = Path(__file__).parents[1] / "benchmarks/demo/checkpoint"
QUESTIONS = 300
QUERY_LENGTH = 4


@pytest.fixture(scope="module")
def reference() -> float:
    """The checkpoint's accuracy with the eager interpreter."""
    return evaluate(EagerAnswerer(CHECKPOINT, QUERY_LENGTH), held_out(QUESTIONS)).accuracy


def test_it_answers(reference: float) -> None:
    """Far above what the commonest answer of each kind of question would give (about 0.35)."""
    assert reference > 0.65


def test_latents_carry_information(reference: float) -> None:
    off = evaluate(EagerAnswerer(CHECKPOINT, QUERY_LENGTH, align=False), held_out(QUESTIONS)).accuracy
    assert reference - off >= 0.10


@pytest.mark.parametrize(("precision", "largest_drop"), [("--fp32", 0.0), ("--int8", 0.03), ("--int4", 0.05)])
def test_bundles_answer_as_well(reference: float, precision: str, largest_drop: float, tmp_path: Path) -> None:
    assert cli.main([str(CHECKPOINT), "-o", str(tmp_path / "b"), precision]) == 0
    with load(tmp_path / "b") as fusion:

        def answer(picture: object, question: str) -> str:
            return fusion.answer(picture, question, query_length=QUERY_LENGTH).text  # type: ignore[arg-type]

        assert evaluate(answer, held_out(QUESTIONS)).accuracy >= reference - largest_drop
