"""Ask the same question about every new camera frame, without blocking the robot's loop.

The loop reads frames at the camera's rate and submits each one. The asker's thread answers about the newest frame and
skips those that it missed.

python examples/camera_loop.py BUNDLE "Is the path clear?"                         # simulated frames
python examples/camera_loop.py BUNDLE "Is the path clear?" --camera 0              # /dev/video0 (needs OpenCV)
python examples/camera_loop.py BUNDLE "Is the path clear?" --camera drive.mp4      # a file
python examples/camera_loop.py BUNDLE "Is the path clear?" --camera \\
    "nvarguscamerasrc ! nvvidconv ! video/x-raw,format=NV12 ! appsink drop=1 max-buffers=1" --color nv12  # CSI camera
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

import fusion_edge
from fusion_edge import Answer, Asker, Cancelled, FusionError, Request, Sampling, Superseded

Frame = npt.NDArray[np.uint8]


def camera(source: str) -> Iterator[Frame]:
    """Yield the frames of a device number, a file or a GStreamer pipeline, until it ends."""
    import cv2  # pyright: ignore[reportMissingImports]

    capture = cv2.VideoCapture(source, cv2.CAP_GSTREAMER) if "!" in source else cv2.VideoCapture(device(source))
    if not capture.isOpened():
        raise SystemExit(f"The camera {source!r} does not open.")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, not a queued one
    try:
        while (read := capture.read())[0]:
            yield read[1]
    finally:
        capture.release()


def device(source: str) -> int | str:
    """Return a number as such: OpenCV opens that device."""
    return int(source) if source.isdigit() else source


def simulated(rate: float) -> Iterator[Frame]:
    """Yield frames ``[height, width, 3]`` in BGR, as OpenCV does: a gray circle that moves, on red."""
    side, radius = 256, 36
    rows, columns = np.mgrid[:side, :side]
    number = 0
    while True:
        center = 60 + (12 * number) % (side - 120)
        frame = np.full((side, side, 3), (40, 35, 205), np.uint8)
        frame[(rows - 184) ** 2 + (columns - center) ** 2 < radius**2] = 128
        yield frame
        number += 1
        time.sleep(1 / rate)


def react(request: Request[Answer]) -> None:
    """Use an answer. The asker's thread calls this, also for requests that ended without an answer."""
    try:
        answer = request.result()
    except (Superseded, Cancelled):  # by a newer frame, at the end of the program
        return
    except FusionError as error:  # too late, for example: the robot knows nothing and should stop
        print(f"no answer: {error}", flush=True)
    else:
        print(f"{answer.text} ({answer.finish_reason}, frame {1000 * request.age:.0f} ms old)", flush=True)


def main() -> None:
    """Read and submit frames here; the asker's thread answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle")
    parser.add_argument("question")
    parser.add_argument("--camera", metavar="SOURCE", help="device number, file or GStreamer pipeline")
    parser.add_argument("--color", default="bgr", choices=("rgb", "bgr", "nv12", "i420", "yuyv"))
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0, help="simulated frames per second")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds from a frame to its answer")
    arguments = parser.parse_args()

    frames = simulated(arguments.rate) if arguments.camera is None else camera(arguments.camera)
    sampling = Sampling(max_new_tokens=16)
    with fusion_edge.load(arguments.bundle) as fusion, Asker(fusion, skip_unchanged=True) as asker:
        for _, frame in zip(range(arguments.frames), frames, strict=False):
            request = asker.submit(
                frame,
                arguments.question,
                key="front",
                deadline=arguments.deadline,
                color=arguments.color,
                sampling=sampling,
            )
            request.add_done_callback(react)
            # Steer here: the loop goes on while the model thinks.
        print(asker.latencies())


if __name__ == "__main__":
    main()
