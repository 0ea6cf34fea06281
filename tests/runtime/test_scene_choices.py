"""``Scene.choose``: the scores of ``Fusion.choose`` behind a kept prefix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.watched_backend import backend, picture, watched_fusion
from support.demo_model import OTHER_PLACE_QUESTION, PICTURE, PLACE_QUESTION, PLACES, PRESENCE_QUESTIONS
from support.paths import DEMO_CHECKPOINT

from fusion_edge.export import cli
from fusion_edge.export.reference.eager_backend import open_checkpoint
from fusion_edge.runtime import Cancelled, Fusion, FusionError, Turn, UsageError, load
from fusion_edge.runtime.stages import DECODE_STEP, PREFILL

GUIDE = "What is in the picture?"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fusion]:
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(folder), "--fp32", "--query-len", "4"]) == 0
    with load(folder) as fusion:
        yield fusion


def test_a_guide_that_is_the_question_gives_the_ordinary_scores(demo: Fusion) -> None:
    expected = demo.choose(PICTURE, PLACE_QUESTION, PLACES)
    with demo.look(PICTURE, PLACE_QUESTION) as scene:
        chosen = scene.choose(PLACE_QUESTION, PLACES)
    assert chosen.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert chosen.text == expected.text
    assert chosen.prompt_tokens == expected.prompt_tokens


def test_without_a_guide_every_question_is_its_own(demo: Fusion) -> None:
    expected = demo.choose(PICTURE, PLACE_QUESTION, PLACES)
    with demo.look(PICTURE) as scene:
        assert scene.choose(PLACE_QUESTION, PLACES).logprobs == expected.logprobs


def test_scores_under_a_guide_equal_the_eager_interpreter(demo: Fusion) -> None:
    history = [Turn(PRESENCE_QUESTIONS[0], "yes")]
    with open_checkpoint(DEMO_CHECKPOINT) as eager:
        expected = eager.look(PICTURE, GUIDE, query_length=4).choose(PLACE_QUESTION, PLACES, history=history)
    with demo.look(PICTURE, GUIDE) as scene:
        chosen = scene.choose(PLACE_QUESTION, PLACES, history=history)
    assert chosen.logprobs == pytest.approx(expected.logprobs, abs=2e-3)


def test_a_list_of_questions_equals_single_questions(demo: Fusion) -> None:
    questions = [PLACE_QUESTION, OTHER_PLACE_QUESTION, PLACE_QUESTION]
    with demo.look(PICTURE, GUIDE) as scene:
        together = scene.choose(questions, PLACES)
        alone = [scene.choose(question, PLACES) for question in questions]
        answer = scene.answer(PLACE_QUESTION)
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    assert together[0].logprobs == pytest.approx(together[2].logprobs, abs=1e-6)  # the prefix does not change
    assert together[0].logprobs[answer.text] == pytest.approx(math.fsum(answer.logprobs), abs=1e-6)


# With a backend that has no graphs ----------------------------------------------------------------------------------


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    return watched_fusion(tiny_bundle)


def test_questions_of_a_scene_run_their_own_rows_only(fusion: Fusion) -> None:
    scene = fusion.look(picture(), GUIDE)
    backend(fusion).calls.clear()
    chosen = scene.choose([PLACE_QUESTION, "Why?"], ("yes", "no"))
    calls = backend(fusion).calls
    assert [name for name, _ in calls if name in ("encode", "align", "prefill_prefix")] == []
    prefills: list[Any] = [arguments for name, arguments in calls if name == "prefill"]
    assert [len(rows) < one.prompt_tokens for (rows, *_), one in zip(prefills, chosen, strict=True)] == [True, True]


@pytest.mark.parametrize("stage", [PREFILL, DECODE_STEP])
def test_a_scene_outlives_a_cancel(fusion: Fusion, stage: str) -> None:
    scene = fusion.look(picture(), GUIDE)
    expected = scene.choose(PLACE_QUESTION, PLACES)

    def cancel(entered: str) -> None:
        if entered == stage:
            fusion.cancel()

    with pytest.raises(Cancelled):
        scene.choose([PLACE_QUESTION, "Why?"], PLACES, on_stage=cancel)
    assert scene.choose(PLACE_QUESTION, PLACES).logprobs == expected.logprobs


@pytest.mark.parametrize("end", [lambda scene, fusion: scene.close(), lambda scene, fusion: fusion.clear_image_cache()])
def test_a_scene_that_is_gone(fusion: Fusion, end: Callable[[Any, Fusion], None]) -> None:
    scene = fusion.look(picture(), GUIDE)
    end(scene, fusion)
    backend(fusion).calls.clear()
    with pytest.raises(FusionError, match="This scene"):
        scene.choose(PLACE_QUESTION, ("yes", "no"))
    assert backend(fusion).calls == []


def test_wrong_choices(fusion: Fusion) -> None:
    scene = fusion.look(picture(), GUIDE)
    with pytest.raises(UsageError, match="'yes' is the start of 'yesterday'"):
        scene.choose(PLACE_QUESTION, ("yes", "yesterday"))
    with pytest.raises(UsageError, match="The list of questions is empty"):
        scene.choose([], ("yes", "no"))
