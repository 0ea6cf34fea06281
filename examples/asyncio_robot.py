"""A robot on asyncio: a control loop at a fixed rate, and two cameras whose questions share one model.

python examples/asyncio_robot.py BUNDLE "Is the path clear?" --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import time

import numpy as np
import numpy.typing as npt

import fusion_edge
from fusion_edge import Asker, FusionError, Sampling

Frame = npt.NDArray[np.uint8]
COLORS = {"front": (205, 35, 40), "rear": (50, 95, 180)}


class Camera:
    """A simulated camera: a gray circle that moves, on a color. Replace :meth:`frame` with your driver."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows, self._columns = np.mgrid[:256, :256]

    def frame(self) -> Frame:
        """Return the newest frame, RGB ``[256, 256, 3]``."""
        center = 60 + int(120 * time.monotonic()) % 136
        frame = np.full((256, 256, 3), COLORS[self.name], np.uint8)
        frame[(self._rows - 184) ** 2 + (self._columns - center) ** 2 < 36**2] = 128
        return frame


async def watch(camera: Camera, question: str, asker: Asker, seen: dict[str, str]) -> None:
    """Ask about the camera's newest frame, again and again."""
    while True:
        try:
            answer = await asker.ask(
                camera.frame(), question, key=camera.name, deadline=2.0, sampling=Sampling(max_new_tokens=16)
            )
        except FusionError as error:  # too late, for example
            print(f"{camera.name}: {error}", flush=True)
            seen.pop(camera.name, None)
        else:
            print(f"{camera.name}: {answer.text} ({answer.finish_reason})", flush=True)
            seen[camera.name] = answer.text


async def control(rate: float, seconds: float, seen: dict[str, str]) -> float:
    """Steer at a fixed rate by what the cameras saw last. Return the longest delay of a tick in seconds."""
    worst, start = 0.0, time.monotonic()
    for tick in range(int(rate * seconds)):
        due = start + tick / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        worst = max(worst, time.monotonic() - due)
        # Steer here. An empty ``seen`` means that nothing is known: stop.
    return worst


async def drive(asker: Asker, question: str, rate: float, seconds: float) -> None:
    """Run both cameras beside the control loop, and cancel them at its end."""
    seen: dict[str, str] = {}
    cameras = [asyncio.create_task(watch(Camera(name), question, asker, seen)) for name in COLORS]
    try:
        worst = await control(rate, seconds, seen)
    finally:
        for camera in cameras:
            camera.cancel()  # cancels the question within the model, too
    print(f"longest delay of a tick: {1000 * worst:.1f} ms; {asker.latencies()}", flush=True)


def main() -> None:
    """Load the model and drive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle")
    parser.add_argument("question")
    parser.add_argument("--rate", type=float, default=20.0, help="ticks of the control loop per second")
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()

    with fusion_edge.load(arguments.bundle) as fusion, Asker(fusion) as asker:
        asyncio.run(drive(asker, arguments.question, arguments.rate, arguments.seconds))


if __name__ == "__main__":
    main()
