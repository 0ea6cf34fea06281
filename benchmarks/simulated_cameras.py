"""Simulated cameras for measurements of a robot's loop: frames whose answers are known beforehand."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fusion_edge.benchmarks.demo.pictures import scenes
from fusion_edge.runtime import Fusion, Sampling

SIZE = (1280, 720)
"""Width and height of a frame."""
SAMPLING = Sampling(max_new_tokens=16)
QUESTIONS = (
    "How many things are there?",
    "What color is the background?",
    "What kind of thing is in the middle?",
    "Is there a dog?",
)
CHOOSING, CHOICES = "Is there a dog?", ("yes", "no")

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Script:
    """The frames that the cameras show, and what the model answers about each, asked alone."""

    frames: tuple[Frame, ...]
    """RGB ``[720,1280,3]``."""
    answers: dict[tuple[int, str], tuple[int, ...]]
    """Token ids by number of the frame and question."""
    choices: tuple[str, ...]
    """The choice between :data:`CHOICES` about :data:`CHOOSING`, by number of the frame."""


def frames(count: int, seed: int = 0) -> tuple[Frame, ...]:
    """Return held-out pictures of the demo model, enlarged to camera frames."""
    pictures = itertools.islice(scenes("held_out", seed), count)
    return tuple(np.asarray(Image.fromarray(pixels).resize(SIZE)) for _, pixels in pictures)


def write_script(fusion: Fusion, count: int) -> Script:
    """Ask every question about every frame."""
    shown = frames(count)
    asked = itertools.product(range(count), QUESTIONS)
    answers = {(n, q): fusion.answer(shown[n], q, sampling=SAMPLING).token_ids for n, q in asked}
    choices = tuple(fusion.choose(frame, CHOOSING, CHOICES).text for frame in shown)
    return Script(shown, answers, choices)


class Camera:
    """Shows a script's frames at a fixed rate in a thread, each in the same buffer, as drivers do."""

    def __init__(
        self, shown: tuple[Frame, ...], rate: float, first: int, when_frame: Callable[[int, Frame], object]
    ) -> None:
        """Start with frame ``first``. ``when_frame`` gets each frame's number and the buffer."""
        self._shown, self._rate, self._when_frame = shown, rate, when_frame
        self._numbers = itertools.islice(itertools.cycle(range(len(shown))), first, None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="camera")
        self.frames = 0

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _show(self) -> None:
        buffer = np.empty_like(self._shown[0])
        start = time.monotonic()
        while not self._stop.wait(max(0.0, start + self.frames / self._rate - time.monotonic())):
            number = next(self._numbers)
            buffer[:] = self._shown[number]
            self._when_frame(number, buffer)
            self.frames += 1
