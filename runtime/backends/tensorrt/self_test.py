"""Test at load that decode steps continue prompts: the KV cache holds what engines and backend have written."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

import numpy as np

from fusion_edge.runtime.backends.base import Floats, KvPrefix
from fusion_edge.runtime.bundle.engine_manifest import Engines
from fusion_edge.runtime.bundle.graphs import LLM
from fusion_edge.runtime.errors import FusionError

MAX_DIFFERENCE = 0.2
"""Tolerance between logits of decode and prefill, in standard deviations: ten times that of float16 kernels."""
CHECKED_STEPS = 8
"""Decode steps that a load checks, for each window: a cache without so many tokens changes logits beyond tolerance."""
PREFIX_TOKENS = 5
"""Odd, so an int8 cache leaves slots behind it unused. Few, so that these weigh much."""


class Prefill(Protocol):
    """Runs a prompt."""

    def __call__(self, prompt: Floats, latents: range, capacity: int, prefix: KvPrefix | None = None, /) -> Floats:
        """Run ``prompt [L,D]``, whose rows ``latents`` are latents, behind a prefix. Return its logits ``[V]``."""
        ...


def check_decode(
    engines: Engines,
    width: int,
    prefill: Prefill,
    decode: Callable[[Floats, int], Floats],
) -> None:
    """Raise :class:`FusionError` unless decode steps give the logits of a prompt that includes their tokens.

    Each window runs some steps for prompts of its own, one a profile for prompts: the last step reads what the
    others wrote, where the cache holds tokens of the prompt before. The test fails if TensorRT does not update
    caches in place. It guarantees that for TensorScatter only, which exists since 10.15; with older operators the
    result of sharing input and output memory is undefined.

    Args:
        engines: Engines under test.
        width: Size of an embedding.
        prefill: Runs a prompt.
        decode: Runs a step with an embedding ``[D]`` in the window of a number.
    """
    usual = engines.engines[LLM][0].profiles[0]["latents"][1]
    windows, prompts = engines.decode_windows, engines.prompt_lengths
    room = min(windows[0], engines.max_context) - CHECKED_STEPS  # all steps fit the smallest window
    latents = min(usual, room - 2)
    shortest = (prompts[0][0], *(most + 1 for _, most in prompts[:-1]))
    lengths = [min(max(latents + 2, length), room) for length in shortest]
    generator = np.random.default_rng(0)
    for (number, window), length in itertools.product(enumerate(windows), lengths):
        prompt: Floats = generator.normal(0, 1, (length + CHECKED_STEPS, width)).astype(np.float32)
        prefill(prompt[:length], range(latents), len(prompt))
        decoded = [decode(row, number).copy() for row in prompt[length:]][-1]
        expected = prefill(prompt, range(latents), len(prompt))
        _check(engines, decoded, expected, f"for {window} slots of the KV cache")


def check_prefix(
    engines: Engines,
    width: int,
    prefill: Prefill,
    prefill_prefix: Callable[[Floats], KvPrefix],
    decode: Callable[[Floats], Floats],
) -> None:
    """Raise :class:`FusionError` unless decode steps behind a prefix and a rest give the logits of one prompt.

    Another prompt runs in between, so the prefix is restored, and slots that stay unused hold tokens.

    Args:
        engines: Engines under test.
        width: Size of an embedding.
        prefill: Runs a prompt.
        prefill_prefix: Runs a prefix ``[L,D]`` and keeps it.
        decode: Runs a step with an embedding ``[D]``.
    """
    length = PREFIX_TOKENS + 3  # a latent, and two tokens behind it
    shape = length + CHECKED_STEPS, width
    generator = np.random.default_rng(0)
    prompt, other = (generator.normal(0, 1, shape).astype(np.float32) for _ in range(2))
    prefix = prefill_prefix(prompt[:PREFIX_TOKENS])
    prefill(other, range(1), len(other))
    prefill(prompt[PREFIX_TOKENS:length], range(1), len(prompt), prefix)
    decoded = [decode(row).copy() for row in prompt[length:]][-1]
    expected = prefill(prompt, range(PREFIX_TOKENS, PREFIX_TOKENS + 1), len(prompt))
    _check(engines, decoded, expected, "behind a prefix")


def _check(engines: Engines, decoded: Floats, expected: Floats, where: str) -> None:
    """Raise :class:`FusionError` if logits differ by more than rounding, or are NaN."""
    if not np.abs(decoded - expected).max() <= MAX_DIFFERENCE * expected.std():
        raise FusionError(
            f"Decode and prefill of {engines.machine} disagree {where}, so answers would be wrong; run the bundle "
            "with --device cpu or another version of TensorRT, and report this."
        )
