"""A scene whose guide is the question gives the answers of the ordinary way, which are those of the released code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.watched_backend import picture
from test_golden import NEW_TOKENS, Case, each_case, export

from fusion_edge.export import cli
from fusion_edge.runtime import Fusion, Sampling, Turn, load
from fusion_edge.runtime.backends.base import Floats

FORMATS = ("--fp32", "--fp16 --target cuda", "--int4", "--int4 --asym --accuracy-level 0", "--int8")
ROUNDING, INT8_ROUNDING = 1e-5, 0.2  # of logits, in standard deviations
GREEDY = Sampling(max_new_tokens=NEW_TOKENS)
HISTORY = [Turn("What is it? ", "A circle."), Turn("Where?", "Left.")]


def guide_of(history: list[Turn], question: str) -> str:
    return "".join(text.strip() for text in (*(turn.question for turn in history), question))


@each_case
def test_the_released_answers_behind_a_scene(case: Case, tmp_path: Path) -> None:
    tokens = [] if case.image_tokens is None else ["--image-tokens", str(case.image_tokens)]
    folder = export(
        case.facts["checkpoint"], tmp_path / "bundle", "--fp32", *tokens, "--query-len", str(case.facts["query_len"])
    )
    with load(folder) as fusion:
        for number, question, history in case.turns():
            scene = fusion.look(case.image, guide_of(history, question))
            answer = scene.answer(question, history=history, sampling=GREEDY)
            assert list(answer.token_ids) == case.arrays[f"t{number}_output_ids"].tolist()


Exported = Callable[[str], Fusion]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """``exported(options)`` returns a model, which the next call closes."""
    models: list[Fusion] = []

    def open_model(options: str) -> Fusion:
        folder = tmp_path_factory.mktemp("bundle") / "bundle"
        assert cli.main([str(tiny_checkpoint), "-o", str(folder), *options.split()]) == 0
        models.append(load(folder, device="cpu", threads=1, cached_images=2))
        return models[-1]

    yield open_model
    for model in models:
        model.close()


@contextmanager
def prefills(fusion: Fusion) -> Iterator[list[Floats]]:
    """Collect the logits of every prefill."""
    seen: list[Floats] = []
    prefill = fusion.backend.prefill

    def watch(*inputs: Any) -> Floats:
        seen.append(prefill(*inputs).astype(np.float64))
        return prefill(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion.backend, "prefill", watch)
        yield seen


def difference(first: Floats, second: Floats) -> float:
    """Return the largest difference in standard deviations."""
    return float(np.abs(first - second).max() / first.std())


@pytest.mark.parametrize("options", FORMATS)
def test_answers_of_every_format_behind_a_scene(exported: Exported, options: str) -> None:
    """Also in a conversation, and for a prefix that other questions and another scene have used."""
    fusion, question = exported(options), "How many?"
    for length in fusion.manifest.query_lengths:
        with prefills(fusion) as logits:
            expected = [
                fusion.answer(picture(), question, history=HISTORY[:count], sampling=GREEDY, query_length=length)
                for count in (1, 2)
            ]
            guides = [guide_of(HISTORY[:count], question) for count in (1, 2)]
            scenes = [fusion.look(picture(), guide, query_length=length) for guide in guides]
            for number in (0, 1, 0, 1):
                answer = scenes[number].answer(question, history=HISTORY[: number + 1], sampling=GREEDY)
                assert answer.token_ids == expected[number].token_ids
                assert answer.prompt_tokens == expected[number].prompt_tokens
                assert difference(logits[number], logits[-1]) < ROUNDING
                scenes[number].answer("Why?", sampling=GREEDY)
            scenes[0].answer(question, history=HISTORY[:2], sampling=GREEDY)  # guided by other questions
            assert difference(logits[1], logits[-1]) > 10 * ROUNDING


@pytest.mark.parametrize("precision", ["--fp32", "--int4"])
def test_an_int8_cache_behind_a_scene(exported: Exported, precision: str) -> None:
    """A prompt attends to the integers of its prefix, where the ordinary way attends to floats."""
    fusion = exported(f"{precision} --kv-cache int8")
    with prefills(fusion) as logits:
        fusion.answer(picture(), "How many?", sampling=GREEDY)
        scene = fusion.look(picture(), "How many?")
        first = scene.answer("How many?", sampling=GREEDY)
        scene.answer("Why?", sampling=GREEDY)
        assert scene.answer("How many?", sampling=GREEDY).token_ids == first.token_ids
    ordinary, behind, other, again = logits
    assert np.array_equal(behind, again)
    assert difference(ordinary, behind) < INT8_ROUNDING < difference(ordinary, other)
