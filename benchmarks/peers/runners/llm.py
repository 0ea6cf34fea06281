"""Workload of every LLM runner: a prefill, then greedy decode steps around one context. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fusion_edge.benchmarks.peers.runners.worker import (
    CannotRunError,
    Measurement,
    Settings,
    Workload,
    option,
    peak,
    resident,
)

FIRST_TOKEN, TOKENS = 1000, 1000  # the prompt repeats these ids, which every LLM's vocabulary has
WARM_UP = 8  # tokens


@dataclass(frozen=True)
class LlmWorkload(Workload):
    """Sizes of a run."""

    prompt: int = option(900, "tokens of the timed prefill")
    context: int = option(1000, "tokens in the KV cache in the middle of the timed decode steps")
    steps: int = option(32, "timed decode steps")
    capacity: int = option(4096, "tokens of the KV cache in engines that allocate it ahead")

    def fits(self) -> bool:
        """Return whether the timed steps come after the prompt and within the capacity."""
        return self.untimed_steps >= 0 and self.context + self.steps <= self.capacity

    @property
    def untimed_steps(self) -> int:
        """Decode steps between the prompt and the timed steps."""
        return self.context - self.steps // 2 - self.prompt

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return [FIRST_TOKEN + i % TOKENS for i in range(self.prompt)]


@dataclass(frozen=True)
class LlmFigures:
    """Figures of one run."""

    load_seconds: float
    """Including a first short prompt, because some engines touch the whole KV cache at first use."""
    prefill_seconds: float
    decode_tokens_per_second: float
    """1 over the median decode step."""
    memory: int
    """Resident bytes of the process at the end, mapped file pages included."""
    peak_memory: int
    """Peak resident bytes."""


class Llm(Protocol):
    """Loaded LLM."""

    @property
    def settings(self) -> Settings:
        """Options passed to the engine."""
        ...

    def prefill(self, ids: list[int]) -> None:
        """Restart with a prompt: compute the logits of its last token and choose the most likely next token."""
        ...

    def step(self) -> None:
        """Run the chosen token and choose the next one."""
        ...


def measure(
    load: Callable[[Path, LlmWorkload, Settings], Llm], model: Path, work: LlmWorkload, settings: Settings
) -> Measurement:
    """Measure in this process. Raises :class:`CannotRunError` for a model that the engine cannot load."""
    start = time.perf_counter()
    try:
        llm = load(model, work, settings)
    except RuntimeError as error:  # of engines in C++
        raise CannotRunError(f"{model} cannot be loaded: {' '.join(str(error).split())}") from None
    llm.prefill(work.prompt_ids[:WARM_UP])
    loaded = time.perf_counter()
    llm.prefill(work.prompt_ids)
    prefilled = time.perf_counter()
    for _ in range(work.untimed_steps):
        llm.step()
    seconds = []
    for _ in range(work.steps):
        started = time.perf_counter()
        llm.step()
        seconds.append(time.perf_counter() - started)
    figures = LlmFigures(
        load_seconds=loaded - start,
        prefill_seconds=prefilled - loaded,
        decode_tokens_per_second=1 / statistics.median(seconds),
        memory=resident(),
        peak_memory=peak(),
    )
    return Measurement(figures, llm.settings)


def expect_file(folder: Path, name: str, writer: str) -> None:
    """Raise :class:`CannotRunError` unless the folder has a file that its writer always writes."""
    if not (folder / name).is_file():
        raise CannotRunError(f"{folder} has no {name}; expected a folder written by {writer}.")
