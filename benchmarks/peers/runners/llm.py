"""What every runner of an LLM does: a prefill, then greedy decode steps around one context. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Measured, peak, resident

FIRST_TOKEN, TOKENS = 1000, 1000  # the prompt repeats these ids, which every vocabulary of an LLM has
WARM_UP = 8  # tokens


@dataclass(frozen=True)
class Workload:
    """What every runner does."""

    prompt: int = 900
    """Tokens of the timed prefill."""
    context: int = 1000
    """Positions in the cache in the middle of the timed decode steps."""
    steps: int = 32
    """Timed decode steps."""
    capacity: int = 4096
    """Positions that the KV cache is allocated for, by every runner that allocates ahead."""
    threads: int = 2

    def fits(self) -> bool:
        """Whether the context comes after the prompt and within the capacity."""
        return self.untimed_steps >= 0 and self.context + self.steps <= self.capacity

    @property
    def untimed_steps(self) -> int:
        """Decode steps that bring the cache from the prompt to the start of the timed ones."""
        return self.context - self.steps // 2 - self.prompt

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return [FIRST_TOKEN + i % TOKENS for i in range(self.prompt)]


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    load_seconds: float
    """Up to the end of a first short prompt: first use touches the whole KV cache, in one runner or another."""
    prefill_seconds: float
    decode_tokens_per_second: float
    """From the median step."""
    memory: int
    """Resident bytes of the process at the end, pages mapped from files included."""
    peak_memory: int
    """The most that was ever resident."""


class Llm(Protocol):
    """A loaded LLM."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the engine was told."""
        ...

    def prefill(self, ids: list[int]) -> None:
        """Start anew: run token ids up to the logits of the last one and choose the most likely next token."""
        ...

    def step(self) -> None:
        """Run the chosen token and choose the next one."""
        ...


def measure(load: Callable[[Path, Workload], Llm], model: Path, work: Workload) -> Measured:
    """Measure in this process. Raises :class:`CannotRunError` for a model that the engine cannot load."""
    start = time.perf_counter()
    try:
        llm = load(model, work)
    except RuntimeError as error:  # what engines in C++ raise
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
    figures = Figures(
        load_seconds=loaded - start,
        prefill_seconds=prefilled - loaded,
        decode_tokens_per_second=1 / statistics.median(seconds),
        memory=resident(),
        peak_memory=peak(),
    )
    return Measured(figures, llm.settings)


def expect_file(folder: Path, name: str, maker: str) -> None:
    """Raise :class:`CannotRunError` unless the folder has the file by which its maker's models are known."""
    if not (folder / name).is_file():
        raise CannotRunError(f"{folder} has no {name}; expected a folder that {maker} wrote.")
