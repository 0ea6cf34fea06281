"""Ask the same question about every new camera frame, without blocking the robot's loop.

The loop reads frames at its own rate. A worker thread answers about the newest frame and skips those that it missed.

python examples/camera_loop.py BUNDLE "Is the path clear?" --frames 100
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import numpy.typing as npt

import fusion_edge
from fusion_edge import Fusion, Sampling

Frame = npt.NDArray[np.uint8]


def camera(count: int, rate: float) -> Iterator[Frame]:
    """Yield frames ``[height, width, 3]`` in RGB: a red circle that moves. Replace it with your camera.

    With OpenCV: ``frame = cv2.VideoCapture(0).read()[1]``, asked with ``color="bgr"``.
    """
    side, radius = 256, 36
    rows, columns = np.mgrid[:side, :side]
    for number in range(count):
        center = 60 + (12 * number) % (side - 120)
        frame = np.full((side, side, 3), 90, np.uint8)
        frame[(rows - 184) ** 2 + (columns - center) ** 2 < radius**2] = (205, 35, 40)
        yield frame
        time.sleep(1 / rate)


def answer_newest(fusion: Fusion, question: str, frames: queue.Queue[Frame | None]) -> None:
    """Answer about every frame that is taken from the queue, until it yields None."""
    while (frame := frames.get()) is not None:
        answer = fusion.answer(frame, question, sampling=Sampling(max_new_tokens=16))
        print(f"{answer.text} ({sum(answer.timings_ms.values()):.0f} ms)", flush=True)


def put_newest(frames: queue.Queue[Frame | None], frame: Frame | None) -> None:
    """Put a frame in the queue in place of one that nobody took. Returns at once."""
    with suppress(queue.Empty):
        frames.get_nowait()
    frames.put_nowait(frame)


def main() -> None:
    """Read frames here, answer in a thread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle")
    parser.add_argument("question")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0, help="frames per second")
    arguments = parser.parse_args()

    frames: queue.Queue[Frame | None] = queue.Queue(maxsize=1)
    with fusion_edge.load(arguments.bundle) as fusion:
        worker = threading.Thread(target=answer_newest, args=(fusion, arguments.question, frames))
        worker.start()
        try:
            for frame in camera(arguments.frames, arguments.rate):
                put_newest(frames, frame)
        finally:
            frames.put(None)  # the worker answers about the last frame, then ends
            worker.join()


if __name__ == "__main__":
    main()
