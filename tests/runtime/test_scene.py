"""Scenes and the cache of images, on a backend without graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.watched_backend import SHORT, backend, in_threads, picture, watched_fusion

from fusion_edge.runtime import Cancelled, DeadlineExceeded, Fusion, FusionError, SceneEvicted, Turn, UsageError, load

EVICTED, CLOSED = r"^This scene is no longer cached: later pictures", r"^This scene has been closed; look"


def watched(tiny_bundle: Path, cached_images: int = 1) -> Fusion:
    fusion = watched_fusion(tiny_bundle)
    return Fusion(fusion.manifest, fusion.backend, fusion.tokenizer, fusion.embed, cached_images=cached_images)


@pytest.fixture
def fusion(tiny_bundle: Path) -> Iterator[Fusion]:
    with watched(tiny_bundle) as fusion:
        yield fusion


@pytest.fixture
def fusion_of_two(tiny_bundle: Path) -> Iterator[Fusion]:
    with watched(tiny_bundle, 2) as fusion:
        yield fusion


def calls(fusion: Fusion) -> list[str]:
    """Return and clear the names of the backend's calls, without decode steps. ``encode 4``: of four crops."""
    names = [
        f"{name} {len(arguments[0])}" if name == "encode" else name  # type: ignore[arg-type]
        for name, arguments in backend(fusion).calls
    ]
    backend(fusion).calls.clear()
    return [name for name in names if name != "decode"]


def arguments_of(fusion: Fusion, name: str) -> Any:
    """Return the arguments of the latest call of a backend's method."""
    return [arguments for called, arguments in backend(fusion).calls if called == name][-1]


# What runs ---------------------------------------------------------------------------------------------------------


def test_a_guided_scene_runs_its_image_once(fusion: Fusion) -> None:
    scene = fusion.look(picture(), "Is the path clear?")
    assert calls(fusion) == ["encode 4", "align", "encode 1", "prefill_prefix"]
    for question in ("Where?", "Why?"):
        scene.answer(question, sampling=SHORT)
        assert calls(fusion) == ["prefill"]
    assert scene.guide == "Is the path clear?"
    assert scene.query_length == 16


def test_without_a_guide_each_question_is_its_own(fusion: Fusion) -> None:
    scene = fusion.look(picture(), query_length=4)
    assert calls(fusion) == ["encode 4", "align"]
    expected = fusion.answer(picture(), "Where?", sampling=SHORT, query_length=4)
    calls(fusion)
    assert scene.answer("Where?", sampling=SHORT).token_ids == expected.token_ids
    assert calls(fusion) == ["encode 1", "prefill"]
    assert scene.guide is None
    assert scene.query_length == 4


@pytest.mark.parametrize("count", [0, 1, 2])
def test_prefix_and_rest_are_the_ordinary_prompt(fusion: Fusion, count: int) -> None:
    history = [Turn("What?", "A circle."), Turn("Where?", "There.")][:count]
    expected = fusion.answer(picture(), "Why?", history=history, sampling=SHORT)
    whole, _, whole_latents, whole_questions, capacity, _ = arguments_of(fusion, "prefill")
    scene = fusion.look(picture(), "".join(turn.question for turn in history) + "Why?")
    answer = scene.answer("Why?", history=history, sampling=SHORT)
    rows, _, latents, questions, same_capacity, prefix = arguments_of(fusion, "prefill")
    (start,) = arguments_of(fusion, "prefill_prefix")
    assert prefix.length == len(start)
    assert np.array_equal(np.concatenate([start, rows]), whole)
    assert np.array_equal(latents + len(start), whole_latents)
    assert np.array_equal(questions + len(start), whole_questions)
    assert (answer.token_ids, answer.prompt_tokens) == (expected.token_ids, expected.prompt_tokens)
    assert same_capacity == capacity


def test_pieces_and_streams_are_those_of_the_answer(fusion: Fusion) -> None:
    scene = fusion.look(picture(), "Where?")
    answer = scene.answer("Where?", sampling=SHORT)
    assert "".join(scene.ask("Where?", sampling=SHORT)).strip() == answer.text
    stream = scene.stream("Where?", sampling=SHORT)
    list(stream)
    assert stream.answer.token_ids == answer.token_ids


def test_choices_behind_a_scene(fusion: Fusion) -> None:
    expected = fusion.choose(picture(), "Where?", ("left", "on the right"))
    scene = fusion.look(picture(), "Where?")
    calls(fusion)
    chosen = scene.choose(["Where?", "Why?", "Where?"], ("left", "on the right"))
    assert calls(fusion).count("prefill") == 3
    assert [choice.probabilities for choice in chosen[::2]] == [expected.probabilities] * 2
    assert scene.choose("Where?", ("left", "on the right")).logprobs == expected.logprobs
    scene.close()
    with pytest.raises(UsageError, match=CLOSED):
        scene.choose("Where?", ("yes", "no"))


def test_documents_behind_a_scene(fusion: Fusion) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    schema = {"enum": ["left", "right"]}
    expected = fusion.json(picture(), "Where?", schema)
    assert fusion.look(picture(), "Where?").json("Where?", schema) == expected


def test_stages_of_a_scene(fusion: Fusion) -> None:
    stages: list[str] = []
    scene = fusion.look(picture(), "Where?", on_stage=stages.append)
    assert stages == ["preprocess", "encode global crops", "alignment", "encode local crop", "prefill"]
    stages.clear()
    answer = scene.answer("Where?", sampling=SHORT, on_stage=stages.append)
    assert stages[:2] == ["alignment", "prefill"]
    assert answer.timings_ms["vision"] == 0


def test_an_empty_guide(fusion: Fusion) -> None:
    scene = fusion.look(picture(), "")
    _, text, _ = arguments_of(fusion, "encode")
    ids = np.array(fusion.tokenizer.encode("").ids, np.int64)
    assert np.array_equal(text, fusion.embed(ids)[None])
    assert scene.answer("Where?", sampling=SHORT).token_ids


# The cache ---------------------------------------------------------------------------------------------------------


def test_cameras_do_not_evict_each_other(fusion_of_two: Fusion) -> None:
    for _ in range(3):
        for camera in range(2):
            fusion_of_two.answer(picture(camera), "Where?", sampling=SHORT)
    names = calls(fusion_of_two)
    assert names.count("encode 4") == names.count("align") == 2
    fusion_of_two.answer(picture(2), "Where?", sampling=SHORT)  # evicts the first
    fusion_of_two.answer(picture(1), "Where?", sampling=SHORT)
    assert calls(fusion_of_two).count("encode 4") == 1
    fusion_of_two.answer(picture(0), "Where?", sampling=SHORT)
    assert calls(fusion_of_two).count("encode 4") == 1


def test_a_scene_takes_the_place_of_its_picture(fusion_of_two: Fusion) -> None:
    fusion_of_two.answer(picture(0), "Where?", sampling=SHORT)
    fusion_of_two.answer(picture(1), "Where?", sampling=SHORT)
    calls(fusion_of_two)
    scene = fusion_of_two.look(picture(0), "Where?")
    assert calls(fusion_of_two) == ["encode 1", "prefill_prefix"]
    fusion_of_two.answer(picture(1), "Where?", sampling=SHORT)
    fusion_of_two.answer(picture(0), "Where?", sampling=SHORT)
    assert "encode 4" not in calls(fusion_of_two)
    scene.answer("Where?", sampling=SHORT)


def test_later_pictures_evict_the_least_recently_used_scene(fusion_of_two: Fusion) -> None:
    first, second = (fusion_of_two.look(picture(camera), "Where?") for camera in range(2))
    expected = first.answer("Where?", sampling=SHORT)
    fusion_of_two.encode_image(picture(2))  # in place of the second
    with pytest.raises(SceneEvicted, match=EVICTED):
        second.answer("Where?", sampling=SHORT)
    assert first.answer("Where?", sampling=SHORT).token_ids == expected.token_ids
    third = fusion_of_two.look(picture(1))
    fusion_of_two.look(picture(3), "Where?")
    with pytest.raises(SceneEvicted, match=EVICTED):
        first.ask("Where?")
    third.answer("Where?", sampling=SHORT)


def test_a_closed_scene_is_evicted_first(fusion_of_two: Fusion) -> None:
    """A camera that closes its scene before it looks again leaves that of another camera alone."""
    front, back = (fusion_of_two.look(picture(camera), "Where?") for camera in range(2))
    expected = back.answer("Where?", sampling=SHORT)
    for frame in range(2, 5):
        front.answer("Where?", sampling=SHORT)  # now the latest used
        front.close()
        front = fusion_of_two.look(picture(frame), "Where?")
    assert back.answer("Where?", sampling=SHORT).token_ids == expected.token_ids


def test_a_question_keeps_the_picture_of_a_closed_scene(fusion_of_two: Fusion) -> None:
    fusion_of_two.encode_image(picture(1))
    fusion_of_two.look(picture(0), "Where?").close()
    fusion_of_two.answer(picture(0), "Where?", sampling=SHORT)
    fusion_of_two.encode_image(picture(2))  # in place of the first
    calls(fusion_of_two)
    fusion_of_two.answer(picture(0), "Where?", sampling=SHORT)
    assert calls(fusion_of_two) == ["encode 1", "prefill"]


def test_scenes_of_one_picture_share_its_features(fusion_of_two: Fusion) -> None:
    scenes = [fusion_of_two.look(picture(), guide) for guide in ("Where?", "Why?")]
    assert calls(fusion_of_two).count("encode 4") == 1
    answers = [scene.answer("What?", sampling=SHORT).token_ids for scene in scenes * 2]
    assert answers[:2] == answers[2:]
    fusion_of_two.look(picture())
    with pytest.raises(SceneEvicted):
        scenes[0].answer("What?", sampling=SHORT)
    assert "encode 4" not in calls(fusion_of_two)


def test_a_closed_scene_leaves_its_picture_cached(fusion: Fusion) -> None:
    with fusion.look(picture(), "Where?") as scene:
        prefix = weakref.ref(arguments_of(fusion, "prefill_prefix")[0])
        scene.answer("Where?", sampling=SHORT)
    scene.close()
    for ask in (scene.ask, scene.answer, scene.stream):
        with pytest.raises(UsageError, match=CLOSED):
            ask("Where?")
    calls(fusion)
    assert prefix() is None
    with fusion.look(picture(), "Why?") as again:
        assert calls(fusion) == ["encode 1", "prefill_prefix"]
        with pytest.raises(UsageError, match=CLOSED):
            scene.answer("Where?")
        again.answer("Where?", sampling=SHORT)


def test_memory_is_free_before_a_new_picture_needs_it(fusion: Fusion) -> None:
    scene = fusion.look(picture(), "Where?")
    (entry,) = fusion.pipeline.images._entries
    assert entry.image is not None
    assert entry.prefix is not None
    held = [weakref.ref(one) for one in (entry.image, entry.prefix, next(iter(entry.image.alignments.values())))]
    del entry
    backend(fusion).calls.clear()
    left: list[int] = []

    def count(name: str) -> None:
        gc.collect()
        left.append(sum(one() is not None for one in held))

    backend(fusion).before = count
    fusion.answer(picture(1), "Where?", sampling=SHORT)
    assert left[0] == 0
    with pytest.raises(SceneEvicted, match=EVICTED):
        scene.answer("Where?")


def test_a_cleared_cache_evicts_scenes(fusion: Fusion) -> None:
    scene = fusion.look(picture(), "Where?")
    fusion.clear_image_cache()
    with pytest.raises(SceneEvicted, match="or the cache was cleared"):
        scene.answer("Where?")


# Streams, cancel, close ---------------------------------------------------------------------------------------------


def test_a_look_with_a_guide_ends_a_stream(fusion_of_two: Fusion) -> None:
    """Both need the KV cache. Without a guide the stream continues."""
    expected = fusion_of_two.answer(picture(), "Where?", sampling=SHORT)
    stream = fusion_of_two.stream(picture(), "Where?", sampling=SHORT)
    next(stream)
    fusion_of_two.look(picture(1))
    list(stream)
    assert stream.answer.token_ids == expected.token_ids
    stream = fusion_of_two.stream(picture(), "Where?", sampling=SHORT)
    next(stream)
    fusion_of_two.look(picture(1), "Where?")
    with pytest.raises(FusionError, match="another question was asked"):
        next(stream)


@pytest.mark.parametrize(
    ("method", "stage", "cached"),
    [
        ("encode", "encode global crops", []),
        ("align", "alignment", ["encode 4"]),
        ("prefill_prefix", "prefill", ["encode 4", "align"]),
    ],
)
def test_a_canceled_look_leaves_what_it_has(fusion: Fusion, method: str, stage: str, cached: list[str]) -> None:
    def cancel(name: str) -> None:
        if name == method:
            fusion.cancel()
            raise FusionError("The run was interrupted.")

    backend(fusion).before = cancel
    with pytest.raises(Cancelled) as stopped:
        fusion.look(picture(), "Where?")
    assert stopped.value.stage == stage
    backend(fusion).before = lambda name: None
    calls(fusion)
    scene = fusion.look(picture(), "Where?")
    assert calls(fusion) == [name for name in ("encode 4", "align", "encode 1", "prefill_prefix") if name not in cached]
    expected = fusion.answer(picture(), "Where?", sampling=SHORT)
    assert scene.answer("Where?", sampling=SHORT).token_ids == expected.token_ids


def test_a_failed_prefix_is_no_scene(fusion: Fusion) -> None:
    def fail(name: str) -> None:
        if name == "prefill_prefix":
            raise FusionError("no memory")

    backend(fusion).before = fail
    with pytest.raises(FusionError, match=r"^no memory$"):
        fusion.look(picture(), "Where?")
    (entry,) = fusion.pipeline.images._entries
    assert (entry.is_scene, entry.prefix) == (False, None)


def test_a_deadline_in_a_look(fusion: Fusion) -> None:
    with pytest.raises(DeadlineExceeded):
        fusion.look(picture(), "Where?", deadline=1e-9)
    scene = fusion.look(picture(), "Where?")
    with pytest.raises(DeadlineExceeded):
        scene.answer("Where?", deadline=1e-9)
    assert scene.answer("Where?", deadline=60, sampling=SHORT).finish_reason != "deadline"


def test_a_scene_closed_or_evicted_before_its_question_begins(fusion: Fusion) -> None:
    stream = fusion.look(picture(), "Where?").stream("Where?")
    fusion.encode_image(picture(1))
    with pytest.raises(SceneEvicted, match=EVICTED):
        next(stream)
    scene = fusion.look(picture(), "Where?")
    stream = scene.stream("Where?")
    scene.close()
    with pytest.raises(UsageError, match=CLOSED):
        next(stream)


def test_threads_ask_several_scenes(tiny_bundle: Path) -> None:
    with watched(tiny_bundle, 3) as fusion:
        scenes = [fusion.look(picture(number // 2), f"Guide {number}?") for number in range(3)]
        expected = [scene.answer("Where?", sampling=SHORT).token_ids for scene in scenes]
        assert len(set(expected)) == 3

        def ask(number: int) -> list[object]:
            return [scenes[number % 3].answer("Where?", sampling=SHORT).token_ids for _ in range(10)]

        for number, found in enumerate(in_threads(6, ask)):
            assert found == [expected[number % 3]] * 10


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_looks(fusion: Fusion) -> None:
    for arguments, expected in (
        ({"guide": 1}, "^The guide is of type int; expected a string"),
        ({"guide": "a\ud800"}, "^The guide is not valid Unicode: character 1"),
        ({"guide": "word " * fusion.max_context}, "^The guide has .* tokens, and a question at most .*; shorten it"),
        ({"guide": "word " * 1_000_000}, "^The prompt has at least .* tokens"),
        ({"query_length": 5}, "^Query length 5 is not offered"),
        ({"color": "cmyk"}, "^color is 'cmyk'"),
        ({"deadline": float("nan")}, "^deadline is nan"),
        ({"on_stage": 1}, "^on_stage is 1"),
    ):
        with pytest.raises(FusionError, match=expected):
            fusion.look(picture(), **arguments)
    assert calls(fusion) == []


def test_bad_questions_about_a_scene(fusion: Fusion) -> None:
    scene = fusion.look(picture(), "Where?")
    calls(fusion)
    with pytest.raises(UsageError, match=r"^The question is empty"):
        scene.answer(" ")
    with pytest.raises(UsageError, match=r"^sampling is of type int"):
        scene.answer("Where?", sampling=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        scene.answer("Where?", query_length=4)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^The image is of type Scene; "):
        fusion.answer(scene, "Where?")  # type: ignore[arg-type]
    assert calls(fusion) == []


def test_a_scene_of_a_closed_model(fusion: Fusion) -> None:
    scene = fusion.look(picture(), "Where?")
    fusion.close()
    for ask in (scene.ask, scene.answer, scene.stream):
        with pytest.raises(UsageError, match=r"^This model has been closed; load the bundle again"):
            ask("Where?")
    with pytest.raises(UsageError, match=r"^This model has been closed"):
        fusion.look(picture())
    scene.close()


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2", None])
def test_bad_sizes_of_the_cache(tiny_bundle: Path, count: Any) -> None:
    with pytest.raises(UsageError, match=r"^cached_images is .*; expected an integer from 1"):
        load(tiny_bundle, cached_images=count)
    with pytest.raises(UsageError, match=r"^cached_images is"):
        watched(tiny_bundle, count)
