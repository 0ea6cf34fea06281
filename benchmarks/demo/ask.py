"""Ask a bundle of the demo model about a picture: the answers, their probability, and the time of each stage.

    python -m fusion_edge.benchmarks.demo.ask BUNDLE "What is at the top right?" "Where is the dog?"

The model looks at the picture once, and answers all questions behind that scene.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

from fusion_edge.benchmarks.demo.terminal_picture import terminal_picture
from fusion_edge.runtime import load
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.stages import TIMINGS

PICTURE = Path(__file__).resolve().parent / "picture.png"
GUIDE = "What is in the picture?"


class StageTimer:
    """Adds up the time of stages. Pass it as ``on_stage``."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._stage, self._since = "", time.perf_counter()

    def __call__(self, stage: str) -> None:
        """End the current stage, and start another."""
        now = time.perf_counter()
        if self._stage:
            self.milliseconds[self._stage] = self.milliseconds.get(self._stage, 0) + 1000 * (now - self._since)
        self._stage, self._since = TIMINGS.get(stage, self._stage), now

    def stop(self) -> None:
        """End the current stage."""
        self("")
        self._stage = ""

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in self.milliseconds.items())
        return f"{sum(self.milliseconds.values()):.1f} ms: {stages}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--image", type=Path, default=PICTURE, metavar="PNG", help="picture (default: %(default)s)")
    return run_command(_ask, parser.parse_args(arguments))


def _ask(options: argparse.Namespace) -> int:
    with load(options.bundle) as fusion:
        timer = StageTimer()
        scene = fusion.look(options.image, GUIDE, on_stage=timer)
        timer.stop()
        drawn = terminal_picture(options.image, os.environ) if sys.stdout.isatty() else None
        sys.stdout.write(f"{drawn or ''}{os.path.relpath(options.image)}\n")
        sys.stdout.write(f"    look {timer}\n")
        for question in options.questions:
            timer = StageTimer()
            answer = scene.answer(question, on_stage=timer)
            timer.stop()
            probability = math.exp(math.fsum(answer.logprobs))
            sys.stdout.write(f"\n> {question}\n{answer.text} ({probability:.1%})\n    {timer}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
