"""The runtime on a tiny bundle: caches, streaming and sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion_edge.export import cli as export_cli
from fusion_edge.runtime import Fusion, Sampling, load
from fusion_edge.runtime.cli import run as run_cli

SHORT = Sampling(max_new_tokens=6)


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture
def fusion(tiny_bundle: Path) -> Any:
    with load(tiny_bundle) as loaded:
        yield loaded


def record(backend: Any, *names: str) -> list[np.ndarray[Any, Any]]:
    """Return a list that collects the results of the given methods."""
    seen: list[np.ndarray[Any, Any]] = []

    def recording(method: Any) -> Any:
        def call(*inputs: Any) -> Any:
            seen.append(method(*inputs).copy())
            return seen[-1]

        return call

    for name in names:
        setattr(backend, name, recording(getattr(backend, name)))
    return seen


def test_streamed_pieces_are_the_answer(fusion: Fusion) -> None:
    pieces = list(fusion.ask(picture(0), "What is it?", sampling=SHORT))
    answer = fusion.answer(picture(0), "What is it?", sampling=SHORT)
    assert "".join(pieces).strip() == answer.text
    assert len(answer.token_ids) <= 6
    assert answer.finish_reason in ("stop", "length")
    assert answer.timings_ms.keys() == {"preprocess", "vision", "alignment", "prefill", "decode"}


def test_bgr_is_rgb_reversed(fusion: Fusion) -> None:
    rgb = fusion.answer(picture(0), "What?", sampling=SHORT)
    assert fusion.answer(picture(0)[..., ::-1], "What?", sampling=SHORT, color="bgr").token_ids == rgb.token_ids


def test_a_conversation_equals_a_question_with_history(fusion: Fusion) -> None:
    conversation = fusion.conversation(picture(0))
    first = conversation.answer("What is it?", sampling=SHORT)
    second = conversation.answer("Why?", sampling=SHORT)
    assert [turn.question for turn in conversation.history] == ["What is it?", "Why?"]
    again = fusion.answer(picture(0), "Why?", history=conversation.history[:1], sampling=SHORT)
    assert again.token_ids == second.token_ids
    assert second.prompt_tokens > first.prompt_tokens


def test_sampling_is_seeded_and_stops(fusion: Fusion) -> None:
    hot = Sampling(max_new_tokens=12, temperature=2.0, top_k=50, top_p=0.95, seed=7)
    answers = [fusion.answer(picture(0), "What?", sampling=hot).token_ids for _ in range(2)]
    assert answers[0] == answers[1]
    long = fusion.answer(picture(0), "What?", sampling=Sampling(max_new_tokens=12))
    assert len(long.text) > 3
    stopped = fusion.answer(picture(0), "What?", sampling=Sampling(max_new_tokens=12, stop=(long.text[2:4],)))
    assert stopped.text == long.text[:2].strip()
    assert stopped.finish_reason == "stop"


def test_the_context_bounds_the_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--int4", "--max-context", "96", "--query-len", "4"]
    assert export_cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), *options]) == 0
    with load(tmp_path / "b") as fusion:
        answer = fusion.answer(picture(0), "What?")
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens + len(answer.token_ids) == 96


def test_an_int8_cache_gives_similar_logits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The first token's logits are equal; later ones differ only by the quantization of the cache."""
    steps: dict[str, list[np.ndarray[Any, Any]]] = {}
    for cache in ("float", "int8"):
        folder = tmp_path / cache
        options = ["--fp32", "--kv-cache", cache, "--query-len", "16"]
        assert export_cli.main([str(tiny_checkpoint), "-o", str(folder), *options]) == 0
        with load(folder) as fusion:
            steps[cache] = record(fusion.backend, "prefill", "decode")
            fusion.answer(picture(0), "What?", sampling=Sampling(max_new_tokens=3))
    np.testing.assert_allclose(steps["int8"][0], steps["float"][0], atol=1e-4)
    for rounded, exact in zip(steps["int8"][1:], steps["float"][1:], strict=True):
        assert np.abs(rounded - exact).max() < 0.1 * exact.std()
        assert not np.array_equal(rounded, exact)


def test_float16_graphs_give_similar_logits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A CUDA bundle on the CPU provider differs only by float16 rounding."""
    answers = []
    for target, folder in (("cpu", tmp_path / "cpu"), ("cuda", tmp_path / "cuda")):
        options = ["--fp16", "--target", target, "--query-len", "4"]
        assert export_cli.main([str(tiny_checkpoint), "-o", str(folder), *options]) == 0
        with load(folder, device="cpu") as fusion:
            seen = record(fusion.backend, "prefill")
            fusion.answer(picture(0), "What?", sampling=Sampling(max_new_tokens=1))
            answers.append(seen[0])
    assert np.abs(answers[1] - answers[0]).max() < 0.02 * answers[0].std()


def test_command_line_json(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.fromarray(picture(0)).save(tmp_path / "frame.png")
    command = [str(tiny_bundle), "--image", str(tmp_path / "frame.png"), "--ask", "What?", "--ask", "Why?", "--json"]
    assert run_cli.main([*command, "--max-new-tokens", "5", "--query-len", "4"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len(answers) == 2
    assert answers[0].keys() == {
        "text", "token_ids", "prompt_tokens", "finish_reason", "timings_ms", "tokens_per_second", "logprobs",
        "confidence",
    }  # fmt: skip
    assert len(answers[0]["token_ids"]) <= 5


def test_a_short_prompt_does_not_read_values_of_an_earlier_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The int8 cache keeps old values after a prompt; no decode step may read them."""
    assert export_cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--kv-cache", "int8"]) == 0
    with load(tmp_path / "b") as fusion:
        alone = fusion.answer(picture(1), "What?", sampling=SHORT).token_ids
    with load(tmp_path / "b") as fusion:
        fusion.answer(picture(2), "What is it? " * 40, sampling=SHORT)
        assert fusion.answer(picture(1), "What?", sampling=SHORT).token_ids == alone
