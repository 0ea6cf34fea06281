"""One question after another about one image, every stage timed, through the runtime that a robot runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.benchmarks.latency.result import (
    ALIGNMENT,
    DECODE_STEP,
    ENCODE_GLOBAL,
    ENCODE_LOCAL,
    IMAGE_DECODE,
    PREFILL,
    PREPROCESS,
    SAMPLING,
    STAGES,
    Case,
)
from fusion_edge.benchmarks.latency.statistics import Summary, summarize
from fusion_edge.runtime.backends.base import ImageAlignment
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image
from fusion_edge.runtime.prompts.prompt import Prompt, encode_prompt
from fusion_edge.runtime.prompts.templates import TEMPLATES
from fusion_edge.runtime.sampling import Sampler, Sampling

PICTURE = (1280, 720)  # pixels of the made-up camera frame
QUESTION = "What is in front of the robot, and is the path clear?"
FILLER = " and"
MINIMUM_ROUNDS = 3


class Times:
    """Seconds of every stage, in the order in which they were measured."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.ttft: list[float] = []
        self.followup_ttft: list[float] = []
        self.answer: list[float] = []

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Times what is done inside."""
        started = time.perf_counter()
        yield
        self.stages[stage].append(time.perf_counter() - started)

    def summary(self, stage: str) -> Summary:
        """Of a stage, which every round has equally often."""
        return summarize(self.stages[stage], len(self.ttft))

    @property
    def are_precise(self) -> bool:
        """Whether the medians of TTFT, follow-up TTFT and decode step are precise."""
        summaries = summarize(self.ttft), summarize(self.followup_ttft), self.summary(DECODE_STEP)
        return all(summary.is_precise for summary in summaries)


@dataclass(frozen=True)
class Question:
    """What is asked: about a picture's file, a prompt, and one as long as the context where steps are timed."""

    picture: Path
    prompt: Prompt
    long_prompt: Prompt


def make_up_picture(path: Path) -> None:
    """Write a JPEG of noise on a gradient: neither the cheapest picture to decode nor the dearest."""
    width, height = PICTURE
    gradient = np.linspace(0, 200, width, dtype=np.float32)[None, :, None]
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3)).astype(np.float32)
    Image.fromarray(np.clip(gradient + noise, 0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)


def question(fusion: Fusion, case: Case, picture: Path, asked: str | None) -> tuple[Question, Case]:
    """A question of the case's lengths, or ``asked`` as it is, and the case with the lengths that it has.

    ``prompt_tokens`` and ``context`` of 0 are as many as there are. Raises :class:`UsageError` for lengths that the
    question does not fit in, or that the bundle's context does not hold.
    """
    manifest = fusion.manifest
    template = TEMPLATES[manifest.model.template]
    plain = encode_prompt(fusion.tokenizer, template, (), QUESTION if asked is None else asked)
    shortest = plain.layout(case.image_tokens, case.query_length).length
    filler = fusion.tokenizer.encode(FILLER, add_special_tokens=False).ids[0]
    prompt_tokens = case.prompt_tokens or shortest
    context = case.context or prompt_tokens
    if prompt_tokens < shortest:
        raise UsageError(f"--prompt-tokens {prompt_tokens} is too short; image, latents and question take {shortest}.")
    if context < prompt_tokens:
        raise UsageError(f"--context {context} is less than the prompt's {prompt_tokens} tokens.")
    if context + case.new_tokens > fusion.max_context:
        raise UsageError(
            f"A context of {context} and {case.new_tokens} new tokens do not fit the {fusion.max_context} "
            "positions that there are; ask for less, or export with a larger --max-context."
        )
    prompts = [_filled(plain, length - shortest, filler) for length in (prompt_tokens, context)]
    return Question(picture, *prompts), replace(case, prompt_tokens=prompt_tokens, context=context)


def _filled(prompt: Prompt, count: int, token: int) -> Prompt:
    """The prompt with ``count`` more tokens before the last one."""
    ids = np.insert(prompt.token_ids, len(prompt.token_ids) - 1, np.full(count, token))
    return replace(prompt, token_ids=ids, instruct_indices=prompt.instruct_indices + count)


def for_case(fusion: Fusion, case: Case) -> Fusion:
    """The same loaded model with the case's image tokens. Raises :class:`UsageError` for a number it cannot have."""
    manifest = fusion.manifest
    side = int(case.image_tokens**0.5)
    if side * side != case.image_tokens or not 1 <= side <= manifest.model.vision.grid:
        raise UsageError(
            f"{case.image_tokens} image tokens are no square of at most {manifest.model.vision.grid} a side."
        )
    return Fusion(replace(manifest, image_side=side), fusion.backend, fusion.tokenizer, fusion.embed)


def measure(
    fusion: Fusion,
    case: Case,
    asked: Question,
    is_enough: Callable[[Times], bool],
    beside_steps: Callable[[], None] | None = None,
) -> Times:
    """Rounds of a first question, its steps and a further question, at least three, until they are enough.

    One round before is not counted. ``beside_steps`` is called before and after the steps of the others.
    """
    _round(fusion, case, asked, Times(), None)
    times, enough = Times(), False
    while len(times.ttft) < MINIMUM_ROUNDS or not enough:
        _round(fusion, case, asked, times, beside_steps)
        enough = is_enough(times)
    return times


def _round(fusion: Fusion, case: Case, asked: Question, times: Times, beside_steps: Callable[[], None] | None) -> None:
    sampler = Sampler(Sampling(max_new_tokens=case.new_tokens))
    fusion.clear_image_cache()
    started = time.perf_counter()
    with times.of(IMAGE_DECODE):
        picture = load_image(asked.picture)
    with times.of(PREPROCESS):
        crops = cut_crops(picture)
    with times.of(ENCODE_GLOBAL):
        image = fusion.encode_image(crops)
    with times.of(ALIGNMENT):
        aligned = fusion.align(image, case.query_length)
    _answer_start(fusion, case, asked.prompt, sampler, times, crops)
    times.ttft.append(time.perf_counter() - started)
    if case.context != case.prompt_tokens:
        tokens = fusion.image_tokens(image, asked.long_prompt.instruct_ids)
        fusion.prefill(asked.long_prompt, tokens, aligned, case.new_tokens)
    if beside_steps:
        beside_steps()
    started = time.perf_counter()
    run_steps(fusion, case.new_tokens, sampler, times)
    times.answer.append(times.ttft[-1] + time.perf_counter() - started)
    if beside_steps:
        beside_steps()
    started = time.perf_counter()
    with times.of(PREPROCESS):  # which tells the runtime that it is the same image
        crops = cut_crops(picture)
    _answer_start(fusion, case, asked.prompt, sampler, times, crops)
    times.followup_ttft.append(time.perf_counter() - started)


def _answer_start(
    fusion: Fusion, case: Case, prompt: Prompt, sampler: Sampler, times: Times, crops: npt.NDArray[np.uint8]
) -> int:
    """A question about an image that has been seen, up to its first token."""
    image = fusion.encode_image(crops)
    aligned: ImageAlignment = fusion.align(image, case.query_length)
    with times.of(ENCODE_LOCAL):
        tokens = fusion.image_tokens(image, prompt.instruct_ids)
    with times.of(PREFILL):
        _, _, logits = fusion.prefill(prompt, tokens, aligned, case.new_tokens)
    with times.of(SAMPLING):
        return sampler(logits)


def prefill(fusion: Fusion, case: Case, asked: Question, new_tokens: int) -> None:
    """A prompt about the picture, as long as the context, with room for so many steps."""
    image = fusion.encode_image(cut_crops(load_image(asked.picture)))
    aligned = fusion.align(image, case.query_length)
    tokens = fusion.image_tokens(image, asked.long_prompt.instruct_ids)
    fusion.prefill(asked.long_prompt, tokens, aligned, new_tokens)


def run_steps(fusion: Fusion, count: int, sampler: Sampler, times: Times) -> None:
    """One-token steps behind what was prefilled last."""
    token = 0
    for _ in range(count):
        with times.of(DECODE_STEP):
            logits = fusion.backend.decode(fusion.embed(np.array([token]))[0])
        with times.of(SAMPLING):
            token = sampler(logits)
