"""Measure the share of a decode step that is Python, that is, outside of ONNX Runtime's run of the graph.

    python -m fusion_edge.benchmarks.decode_overhead --bundle BUNDLE --json FILE

Prefills random embeddings without an image, then runs decode steps: embedding, graph, sampling.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

from fusion_edge.benchmarks.latency.machine.info import machine_info
from fusion_edge.runtime.backends.base import ImageAlignment
from fusion_edge.runtime.backends.onnxruntime.graph import Graph
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.cli.options import output_file, positive_integer
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.sampling import Sampler, Sampling
from fusion_edge.runtime.system.output_file import write_whole

WARM_UP = 5  # steps


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--bundle", type=Path, required=True, help="bundle folder")
    add("--prompt", type=positive_integer, default=64, help="tokens of the prompt (default: %(default)s)")
    add("--steps", type=positive_integer, default=60, help="number of timed decode steps (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="also write the result to this JSON file")
    return run_command(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    with load(options.bundle, device="cpu") as fusion:
        prefill(fusion, options.prompt, options.prompt + WARM_UP + options.steps)
        _decode(fusion, WARM_UP)
        whole, inside = _decode(fusion, options.steps)
    share = 1 - inside / whole
    sys.stdout.write(f"decode step {whole / options.steps * 1e3:.1f} ms, {share:.2%} of it in Python\n")
    if options.json:
        result = {
            "step_seconds": whole / options.steps,
            "python_share": share,
            "steps": options.steps,
            "prompt": options.prompt,
            "processor": machine_info(None).processor,
        }
        write_whole(options.json, json.dumps(result, indent=2) + "\n")
    return 0


def prefill(fusion: Fusion, length: int, capacity: int) -> None:
    """Prefill random embeddings, without latents."""
    model = fusion.manifest.model
    width, alignment = model.language.hidden_size, model.alignment
    context = np.zeros((alignment.layers, 0, alignment.window_size**2, width), np.float32)
    nothing = ImageAlignment(np.zeros((0, width), np.float32), context, context)
    rows = np.random.default_rng(0).normal(0, 0.02, (length, width)).astype(np.float32)
    fusion.backend.prefill(rows, nothing, np.zeros((0, 0), np.int64), np.zeros(0, np.int64), capacity)


def _decode(fusion: Fusion, count: int) -> tuple[float, float]:
    """Run decode steps; return the seconds in all and those inside of the graph's runs."""
    inside = 0.0
    run_bound_step = Graph.run_bound_step

    def timed_run(graph: Graph, *arguments: object, **options: object) -> None:
        nonlocal inside
        started = time.perf_counter()
        run_bound_step(graph, *arguments, **options)  # type: ignore[arg-type]
        inside += time.perf_counter() - started

    sampler, token = Sampler(Sampling()), 0
    with mock.patch.object(Graph, "run_bound_step", timed_run):
        started = time.perf_counter()
        for _ in range(count):
            token = sampler(fusion.backend.decode(fusion.embed(np.array([token]))[0]))
        whole = time.perf_counter() - started
    return whole, inside


if __name__ == "__main__":
    sys.exit(main())
