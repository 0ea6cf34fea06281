"""Log-probabilities of a reference's tokens: its own, and another model's after the same tokens (teacher forcing)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime import Fusion
from fusion_edge.runtime.logprobs import log_softmax
from fusion_edge.runtime.requests import PreparedQuestion
from fusion_edge.runtime.run_control import RunControl
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.tokenization.detokenizer import Detokenizer

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceAnswer:
    """A reference's answer."""

    text: str
    token_ids: tuple[int, ...]
    """Generated tokens without the end token."""
    rows: range
    """Rows of its log-probabilities in the file: one for each token, and one for the end token if it was reached."""


class Recorder(Sampler):
    """Keeps the log-probabilities of every step. Returns the forced tokens; without them, the likeliest."""

    def __init__(self, forced: Sequence[int] | None = None) -> None:
        super().__init__(Sampling())
        self._forced = forced
        self.rows: list[Floats] = []
        """Log-probabilities ``[V]`` of each step."""

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the next token for ``logits`` ``[V]``."""
        likeliest = super().__call__(logits)
        self.rows.append(log_softmax(logits))
        done = len(self.rows) - 1
        return likeliest if self._forced is None or done >= len(self._forced) else self._forced[done]


class LogProbabilityFile:
    """Rows of log-probabilities, float32 ``[V]``, in a temporary file."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._count = 0
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open until close)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def append(self, rows: Sequence[Floats]) -> range:
        """Write rows and return their numbers."""
        first, self._count = self._count, self._count + len(rows)
        self._file.seek(4 * self._vocabulary * first)
        self._file.write(np.stack(rows).astype("<f4").tobytes())
        return range(first, self._count)

    def read(self, rows: range) -> Floats:
        """Return rows ``[n,V]``."""
        self._file.seek(4 * self._vocabulary * rows.start)
        content = self._file.read(4 * self._vocabulary * len(rows))
        return np.frombuffer(content, "<f4").reshape(len(rows), self._vocabulary)


@dataclass(frozen=True, eq=False)
class GreedyAnswer:
    """A greedy answer."""

    text: str
    token_ids: tuple[int, ...]
    """Without the end token."""
    rows: Sequence[Floats]
    """Log-probabilities ``[V]`` of each token, and of the end token if it was reached."""


def generate(fusion: Fusion, question: PreparedQuestion, kept: LogProbabilityFile) -> ReferenceAnswer:
    """Generate an answer greedily, and keep its log-probabilities."""
    given = decode_greedily(fusion, question)
    return ReferenceAnswer(given.text, given.token_ids, kept.append(given.rows))


def decode_greedily(fusion: Fusion, question: PreparedQuestion) -> GreedyAnswer:
    """Generate an answer greedily, with its log-probabilities."""
    recorder, control = Recorder(), RunControl()

    def run() -> list[int]:
        fusion.queue.start(control)
        pipeline = fusion.pipeline
        prefilled = pipeline.start(question, recorder, control.stage_hook)
        token, limit = prefilled.token, prefilled.capacity - prefilled.length
        tokens: list[int] = []
        while token not in pipeline.end_ids:
            tokens.append(token)
            if len(tokens) == limit:
                break
            token = pipeline.decode(token, recorder, control.stage_hook)
        return tokens

    tokens = fusion.queue.run(run, control)
    text = Detokenizer(fusion.tokenizer)
    for token in tokens:
        text.push(token)
    text.finish()
    return GreedyAnswer(text.text.strip(), tuple(tokens), recorder.rows)


def force(fusion: Fusion, question: PreparedQuestion, tokens: Sequence[int], count: int) -> Floats:
    """Return the log-probabilities ``[count,V]`` of the first token and of each one that follows ``tokens``."""
    recorder, control = Recorder(tokens), RunControl()

    def run() -> None:
        fusion.queue.start(control)
        token = fusion.pipeline.start(question, recorder, control.stage_hook).token
        while len(recorder.rows) < count:
            token = fusion.pipeline.decode(token, recorder, control.stage_hook)

    fusion.queue.run(run, control)
    return np.stack(recorder.rows)
