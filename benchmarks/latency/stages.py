"""Time the stages of the runtime's pipeline: a first question about an image, decode steps, a follow-up question."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fusion_edge.benchmarks.latency.result import IMAGE_DECODE, STAGES, Case
from fusion_edge.benchmarks.latency.statistics import Summary, summarize
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.errors import UsageError
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.images.preprocessing import load_image
from fusion_edge.runtime.prompts.prompt import Prompt, encode_prompt
from fusion_edge.runtime.requests import PreparedQuestion
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.stages import ALIGNMENT, DECODE_STEP, ENCODE_GLOBAL

PICTURE = (1280, 720)
"""Width and height of the generated camera frame in pixels."""
QUESTION = "What is in front of the robot, and is the path clear?"
FILLER = " and"
MINIMUM_ROUNDS = 3
CACHED_STAGES = (ENCODE_GLOBAL, ALIGNMENT)
"""Stages that the image cache replaces in a follow-up question."""


class Times:
    """Seconds of every stage, in the order of measurement."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.ttft: list[float] = []
        self.followup_ttft: list[float] = []
        self.answer: list[float] = []

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        started = time.perf_counter()
        yield
        self.stages[stage].append(time.perf_counter() - started)

    def of_followup(self, stage: str) -> AbstractContextManager[None]:
        """Time a stage of a follow-up question, except the stages that the image cache replaces."""
        return nullcontext() if stage in CACHED_STAGES else self.of(stage)

    def summary(self, stage: str) -> Summary:
        """Summarize a stage. Every round runs it equally often."""
        return summarize(self.stages[stage], len(self.ttft))

    @property
    def are_precise(self) -> bool:
        """Return whether the medians of TTFT, follow-up TTFT and decode step are precise."""
        summaries = summarize(self.ttft), summarize(self.followup_ttft), self.summary(DECODE_STEP)
        return all(summary.is_precise for summary in summaries)


@dataclass(frozen=True)
class TimedQuestion:
    """A question of given lengths."""

    picture: Path
    """Image file."""
    prompt: Prompt
    long_prompt: Prompt
    """As long as the context of the timed decode steps."""


def make_up_picture(path: Path) -> None:
    """Write a JPEG of noise on a gradient, with a typical decoding time."""
    width, height = PICTURE
    gradient = np.linspace(0, 200, width, dtype=np.float32)[None, :, None]
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3)).astype(np.float32)
    Image.fromarray(np.clip(gradient + noise, 0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)


def question(fusion: Fusion, case: Case, picture: Path, asked: str | None) -> tuple[TimedQuestion, Case]:
    """Return a question of the case's lengths, with the text ``asked`` if given, and the case with its real lengths.

    ``prompt_tokens`` of 0 is the length of the question, ``context`` of 0 the length of the prompt. Raises
    :class:`UsageError` if the question is longer, or the lengths exceed the bundle's context.
    """
    manifest = fusion.manifest
    template = TEMPLATES[manifest.model.template]
    plain = encode_prompt(fusion.tokenizer, template, (), QUESTION if asked is None else asked)
    shortest = plain.layout(case.image_tokens, case.query_length).length
    filler = fusion.tokenizer.encode(FILLER, add_special_tokens=False).ids[0]
    prompt_tokens = case.prompt_tokens or shortest
    context = case.context or prompt_tokens
    if prompt_tokens < shortest:
        raise UsageError(f"--prompt-tokens {prompt_tokens} is too small; image, latents and question need {shortest}.")
    if context < prompt_tokens:
        raise UsageError(f"--context {context} is less than the prompt's {prompt_tokens} tokens.")
    if context + case.new_tokens > fusion.max_context:
        raise UsageError(
            f"A context of {context} and {case.new_tokens} new tokens exceed the limit of {fusion.max_context} tokens; "
            "pass smaller values, or export with a larger --max-context."
        )
    prompts = [_filled(plain, length - shortest, filler) for length in (prompt_tokens, context)]
    return TimedQuestion(picture, *prompts), replace(case, prompt_tokens=prompt_tokens, context=context)


def _filled(prompt: Prompt, count: int, token: int) -> Prompt:
    """Insert ``count`` tokens before the last one."""
    ids = np.insert(prompt.token_ids, len(prompt.token_ids) - 1, np.full(count, token))
    return replace(prompt, token_ids=ids, instruct_indices=prompt.instruct_indices + count)


def for_case(fusion: Fusion, case: Case) -> Fusion:
    """Return the loaded model with the case's image tokens. Raise :class:`UsageError` for an impossible number."""
    manifest = fusion.manifest
    side = int(case.image_tokens**0.5)
    if side * side != case.image_tokens or not 1 <= side <= manifest.model.vision.grid:
        raise UsageError(
            f"--image-tokens {case.image_tokens} is not a square number up to {manifest.model.vision.grid**2}."
        )
    return Fusion(replace(manifest, image_side=side), fusion.backend, fusion.tokenizer, fusion.embed)


def measure(
    fusion: Fusion,
    case: Case,
    asked: TimedQuestion,
    is_enough: Callable[[Times], bool],
    around_decode: Callable[[], None] | None = None,
) -> Times:
    """Time rounds of a first question, its decode steps and a follow-up question, until ``is_enough``.

    There are at least three rounds after a warm-up round. ``around_decode`` runs before and after the decode steps of
    a timed round.
    """
    _round(fusion, case, asked, Times(), None)
    times, enough = Times(), False
    while len(times.ttft) < MINIMUM_ROUNDS or not enough:
        _round(fusion, case, asked, times, around_decode)
        enough = is_enough(times)
    return times


def _round(
    fusion: Fusion, case: Case, asked: TimedQuestion, times: Times, around_decode: Callable[[], None] | None
) -> None:
    sampler = Sampler(Sampling())
    picture = first_token(fusion, case, asked, sampler, times)
    if case.context != case.prompt_tokens:
        fusion.pipeline.start(_prepared(case, picture, asked.long_prompt), sampler)
    if around_decode:
        around_decode()
    started = time.perf_counter()
    run_steps(fusion, case.new_tokens, sampler, times)
    times.answer.append(times.ttft[-1] + time.perf_counter() - started)
    if around_decode:
        around_decode()
    started = time.perf_counter()
    fusion.pipeline.start(_prepared(case, picture, asked.prompt), sampler, times.of_followup)
    times.followup_ttft.append(time.perf_counter() - started)


def first_token(fusion: Fusion, case: Case, asked: TimedQuestion, sampler: Sampler, times: Times) -> Image.Image:
    """Time the first question about an image up to its first token, and return the image."""
    fusion.pipeline.clear_image_cache()
    started = time.perf_counter()
    with times.of(IMAGE_DECODE):
        picture = load_image(asked.picture)
    fusion.pipeline.start(_prepared(case, picture, asked.prompt), sampler, times.of)
    times.ttft.append(time.perf_counter() - started)
    return picture


def _prepared(case: Case, picture: Image.Image, prompt: Prompt) -> PreparedQuestion:
    return PreparedQuestion(picture, prompt, Sampling(max_new_tokens=case.new_tokens), case.query_length)


def prefill(fusion: Fusion, case: Case, asked: TimedQuestion, new_tokens: int) -> None:
    """Run a prompt as long as the context, with room for ``new_tokens`` decode steps."""
    case = replace(case, new_tokens=new_tokens)
    fusion.pipeline.start(_prepared(case, load_image(asked.picture), asked.long_prompt), Sampler(Sampling()))


def run_steps(fusion: Fusion, count: int, sampler: Sampler, times: Times) -> None:
    """Run decode steps after the latest prefill."""
    token = 0
    for _ in range(count):
        token = fusion.pipeline.decode(token, sampler, times.of)
