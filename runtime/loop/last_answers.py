"""The last answer of each key, given again while the frame stays the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.loop.request import Request, Run

T = TypeVar("T")

Frame = npt.NDArray[Any]

MAX_KEYS = 16
"""Limit of keys; each keeps a frame. The key that was asked longest ago leaves."""
ROWS = 64
"""Rows that are compared at once: of a frame that differs, one block is read."""


@dataclass(frozen=True, eq=False)
class LastAnswer:
    """An answer with what was asked."""

    frame: Frame
    question: object
    answer: Any


class LastAnswers:
    """The last answer of each key. One thread at a time.

    Frames are compared, not hashed: equal ones of 1920 x 1080 take 1.3 ms (CRC-32 3.3 ms, SHA-256 6 ms, BLAKE2 16 ms),
    different ones a fraction, and no two frames are ever taken for the same.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, LastAnswer] = OrderedDict()

    def once(self, run: Run[T], key: Hashable, frame: Frame, question: object, request: Request[T]) -> T:
        """Return ``run(request)``, or the last answer of ``key`` if its frame and question were these."""
        last = self._kept.get(key)
        if last is not None and last.question == question and _equal(last.frame, frame):
            request.repeat(last.answer)
            return cast("T", last.answer)
        answer = run(request)
        if not isinstance(answer, Answer) or answer.is_complete:
            self._keep(key, LastAnswer(frame, question, answer))
        return answer

    def _keep(self, key: Hashable, last: LastAnswer) -> None:
        self._kept[key] = last
        self._kept.move_to_end(key)
        if len(self._kept) > MAX_KEYS:
            self._kept.popitem(last=False)


def _equal(frame: Frame, other: Frame) -> bool:
    if frame.shape != other.shape or frame.dtype != other.dtype:
        return False
    blocks = range(0, len(frame), ROWS)
    return all(np.array_equal(frame[top : top + ROWS], other[top : top + ROWS]) for top in blocks)
