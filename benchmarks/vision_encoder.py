"""Time of the vision encoder in each of its forms, in turn: four crops without text, one crop with a question.

    python -m fusion_edge.benchmarks.vision_encoder --checkpoint FOLDER --work FOLDER --threads 2

Ranges of inputs are made up: speed only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from fusion_edge.export.bundle_writer import write_bundle
from fusion_edge.export.plan import ExportOptions, plan_export
from fusion_edge.export.safetensors_file import Checkpoint
from fusion_edge.quant.calibration.records import Records
from fusion_edge.quant.calibration.run import Calibrated
from fusion_edge.quant.formats import InputGrid
from fusion_edge.quant.policy import VISION
from fusion_edge.runtime import load
from fusion_edge.runtime.cli import positive, run
from fusion_edge.runtime.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.quantization_report import QuantizationReport

QUESTION_TOKENS = 20


class MadeUp(Records):
    """No calibrated weights, and one range for every input."""

    def __contains__(self, name: str) -> bool:
        return False

    def input_grid(self, name: str) -> InputGrid:
        return InputGrid(0.03, 128)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a FUSION checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles, made once")
    parser.add_argument("--threads", type=positive, default=2, help="of ONNX Runtime (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="in turn (default: %(default)s)")
    return run(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    for vision in VISION:
        if not (options.work / vision).exists():
            with Checkpoint(options.checkpoint) as checkpoint:
                plan = plan_export(checkpoint, ExportOptions(vision=vision, is_calibrated=True))
                made_up = Calibrated(MadeUp(options.work, plan.formats), QuantizationReport((), 0, None))
                write_bundle(plan, options.work / vision, False, made_up)
    seconds: dict[str, list[tuple[float, float]]] = {vision: [] for vision in VISION}
    for _ in range(options.rounds):
        for vision in VISION:
            seconds[vision].append(_time(options.work / vision, options.threads))
    results = {
        vision: {
            "four_crops_seconds": round(statistics.median(crops for crops, _ in times), 3),
            "crop_with_question_seconds": round(statistics.median(crop for _, crop in times), 3),
        }
        for vision, times in seconds.items()
    }
    facts = {"checkpoint": options.checkpoint.name, "threads": options.threads, "rounds": options.rounds}
    sys.stdout.write(json.dumps(facts | results, indent=1) + "\n")
    return 0


def _time(bundle: Path, threads: int) -> tuple[float, float]:
    """Seconds of the global crops, and of the local crop with a question; once unmeasured before."""
    rng = np.random.default_rng(0)
    with load(bundle, threads=threads) as fusion:
        width = fusion.config.language.hidden_size
        pixels = rng.uniform(-1, 1, (GLOBAL_CROPS, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
        text = rng.normal(0, 0.02, (1, QUESTION_TOKENS, width)).astype(np.float32)
        nothing = np.zeros((GLOBAL_CROPS, 0, width), np.float32)
        taken = []
        for crops, words in ((pixels, nothing), (pixels[:1], text)):
            mask = np.ones(words.shape[:2], np.bool_)
            for _ in range(2):
                started = time.perf_counter()
                fusion.backend.encode(crops, words, mask)
                seconds = time.perf_counter() - started
            taken.append(seconds)
    return taken[0], taken[1]


if __name__ == "__main__":
    sys.exit(main())
