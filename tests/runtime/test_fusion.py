"""The pipeline on a fake backend: inputs of every graph, and number of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.fake_backend import FakeBackend
from tokenizers import Tokenizer

from fusion_edge.runtime import Fusion, FusionError, Sampling, Turn
from fusion_edge.runtime.bundle.manifest import TOKENIZER
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image, normalize
from fusion_edge.runtime.tokenization.embeddings import Embeddings

SHORT = Sampling(max_new_tokens=3)


@pytest.fixture
def fusion(tiny_bundle: Path) -> Fusion:
    bundle = open_bundle(tiny_bundle)
    tokenizer = Tokenizer.from_file(str(tiny_bundle / TOKENIZER))
    return Fusion(bundle.manifest, FakeBackend(bundle.manifest.model), tokenizer, Embeddings(bundle))


def picture(seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)


def calls(fusion: Fusion, name: str) -> list[Any]:
    """Return and clear the recorded arguments of a backend's method."""
    assert isinstance(fusion.backend, FakeBackend)
    found = [arguments for method, arguments in fusion.backend.calls if method == name]
    fusion.backend.calls = [call for call in fusion.backend.calls if call[0] != name]
    return found


def crops_encoded(fusion: Fusion) -> list[int]:
    return [len(pixels) for pixels, *_ in calls(fusion, "encode")]


def test_image_features_are_computed_once_per_image(fusion: Fusion) -> None:
    frame = picture(0)
    for question in ("What is it?", "And why?"):
        fusion.answer(frame, question, sampling=SHORT)
    assert crops_encoded(fusion) == [4, 1, 1]  # four global crops once, the local crop for each question
    assert len(calls(fusion, "align")) == 1
    fusion.answer(frame, "And then?", sampling=SHORT, query_length=4)
    assert crops_encoded(fusion) == [1]
    assert len(calls(fusion, "align")) == 1
    frame[:] = picture(1)  # a camera's reused buffer
    fusion.answer(frame, "What is it?", sampling=SHORT)
    assert crops_encoded(fusion) == [4, 1]
    assert len(calls(fusion, "align")) == 1


def test_encode_image_runs_the_vision_encoder_ahead_of_the_question(fusion: Fusion) -> None:
    fusion.encode_image(picture(0))
    assert crops_encoded(fusion) == [4]
    fusion.encode_image(picture(0)[..., ::-1], color="bgr")
    fusion.answer(picture(0), "What is it?", sampling=SHORT)
    assert crops_encoded(fusion) == [1]


def test_encode_image_does_not_end_a_stream(fusion: Fusion) -> None:
    expected = fusion.answer(picture(0), "What is it?", sampling=SHORT)
    stream = fusion.stream(picture(0), "What is it?", sampling=SHORT)
    next(stream)
    fusion.encode_image(picture(1))
    list(stream)
    assert stream.answer.token_ids == expected.token_ids


def test_clear_image_cache_encodes_the_same_image_again(fusion: Fusion) -> None:
    fusion.encode_image(picture(0))
    fusion.clear_image_cache()
    fusion.answer(picture(0), "What is it?", sampling=SHORT)
    assert crops_encoded(fusion) == [4, 4, 1]


def test_an_answer_does_not_depend_on_the_previous_image(fusion: Fusion, tiny_bundle: Path) -> None:
    fusion.answer(picture(0), "What is it?", sampling=SHORT)
    second = fusion.answer(picture(1), "What is it?", sampling=SHORT)
    fresh = Fusion(fusion.manifest, FakeBackend(fusion.config), fusion.tokenizer, fusion.embed)
    assert fresh.answer(picture(1), "What is it?", sampling=SHORT).token_ids == second.token_ids


def test_the_local_crop_is_encoded_with_all_questions(fusion: Fusion) -> None:
    fusion.answer(picture(0), "Why?", history=[Turn("What?", "A circle.")], sampling=SHORT)
    crops = normalize(cut_crops(load_image(picture(0), "rgb")))
    (pixels, no_text, no_mask), (local, text, mask) = calls(fusion, "encode")
    assert np.array_equal(pixels, crops[:4])
    assert np.array_equal(local, crops[4:])
    assert no_text.shape == (4, 0, fusion.config.language.hidden_size)
    assert no_mask.shape == (4, 0)
    ids = np.array(fusion.tokenizer.encode("").ids + fusion.tokenizer.encode("What?Why?", add_special_tokens=False).ids)
    assert np.array_equal(text, fusion.embed(ids)[None])
    assert np.array_equal(mask, (ids != 0)[None])


def test_image_tokens_and_latents_are_at_their_positions(fusion: Fusion) -> None:
    answer = fusion.answer(picture(0), "Why?", history=[Turn("What?", "A circle.")], sampling=SHORT, query_length=4)
    ((rows, image, latents, questions, capacity, _),) = calls(fusion, "prefill")
    assert len(rows) == answer.prompt_tokens
    assert capacity == len(rows) + SHORT.max_new_tokens
    assert latents.shape == (2, 4)
    assert (questions > latents[:, -1]).all()
    for positions in latents:
        assert np.array_equal(rows[positions], image.latents)
    (_, text, mask) = calls(fusion, "encode")[-1]
    patches = fusion.config.vision.patches
    local = normalize(cut_crops(load_image(picture(0), "rgb")))[4:]
    image_tokens = FakeBackend(fusion.config).encode(local, text, mask)[0]
    starts = [start for start in range(len(rows)) if np.array_equal(rows[start : start + patches], image_tokens)]
    assert len(starts) == 1
    assert starts[0] + patches <= latents[0, 0]


def test_a_decode_step_embeds_the_previous_token(fusion: Fusion) -> None:
    answer = fusion.answer(picture(0), "What?", sampling=SHORT)
    steps = [row for (row,) in calls(fusion, "decode")]
    assert len(steps) == len(answer.token_ids) - 1
    for row, token in zip(steps, answer.token_ids[:-1], strict=True):
        assert np.array_equal(row, fusion.embed(np.array([token]))[0])


def test_a_backend_with_a_smaller_context_than_the_bundle(fusion: Fusion) -> None:
    """Engines may have a smaller context: answers end there, and longer prompts are refused."""
    prompt = fusion.answer(picture(0), "What is it?", sampling=SHORT).prompt_tokens
    fusion.backend.max_context = prompt + 1
    answer = fusion.answer(picture(0), "What is it?", sampling=Sampling(max_new_tokens=512))
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")
    fusion.backend.max_context = prompt
    with pytest.raises(FusionError, match=f"has {prompt} tokens .*, and the context holds {prompt} with the answer"):
        fusion.answer(picture(0), "What is it?")


def test_a_custom_backend_is_the_device(fusion: Fusion) -> None:
    assert fusion.device.name == "fake"
    assert not fusion.device.not_taken


def test_the_backend_is_closed_once(fusion: Fusion) -> None:
    with fusion:
        fusion.close()
    assert len(calls(fusion, "close")) == 1
