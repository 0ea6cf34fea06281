"""A quarter of the LLM and the whole vision encoder at the sizes of the 3B model, with random weights."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from fusion_edge.benchmarks.acceptance import bundles
from fusion_edge.benchmarks.acceptance.engine import Target
from fusion_edge.benchmarks.acceptance.engine import build as build_engine
from fusion_edge.benchmarks.acceptance.engine import run as run_engine
from fusion_edge.benchmarks.acceptance.operators import gemm
from fusion_edge.benchmarks.acceptance.steps import Outcome, SkippedStep, Workspace
from fusion_edge.benchmarks.latency.backend_stages import decode_step_behind, measure, prompt_tokens, step_bytes
from fusion_edge.benchmarks.latency.machine.procfs import BackgroundSampler
from fusion_edge.benchmarks.latency.peaks import copy_bandwidth
from fusion_edge.benchmarks.latency.result import Case
from fusion_edge.benchmarks.latency.roofline import encoder_macs, prefill_macs
from fusion_edge.export.engines.builder import BuildOptions
from fusion_edge.export.planning.traffic import moved_tokens
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.devices import open_device
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS
from fusion_edge.runtime.bundle.engines import open_engines
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.formatting import format_bytes

LAYOUT, LAYERS = "3b", 8
"""As many layers as one of four parts of the LLM has."""
QUERY_LENGTH, CONTEXT = 144, 4096
"""Decode steps of this context have several windows of the KV cache."""
STEPS = 32
GEMM_SIZE = 4096
SAMPLED_EVERY = 0.05  # seconds


def bundle_of(workspace: Workspace) -> Path:
    """Return the bundle that :func:`export` makes."""
    return workspace.scratch / "full-size"


def export(workspace: Workspace) -> Outcome:
    """Write a random checkpoint, export it for TensorRT, and delete it."""
    if not bundles.DEMO.is_dir():
        raise SkippedStep(f"{bundles.ONLY_IN_A_CLONE}.")
    bundles.expect_gpu()  # without one, nothing would use the bundle
    from fusion_edge.benchmarks import full_size_checkpoint as full_size  # only a clone has it

    sizes = full_size.LAYOUTS[LAYOUT].with_layers(LAYERS)
    checkpoint, bundle = workspace.scratch / "checkpoint", bundle_of(workspace)
    full_size.write_checkpoint(sizes, checkpoint, full_size.GOLDEN / sizes.like)
    bundles.export(checkpoint, bundle, ["--query-len", str(QUERY_LENGTH), "--max-context", str(CONTEXT)])
    shutil.rmtree(checkpoint)
    size = open_bundle(bundle).manifest.size
    return Outcome(f"{format_bytes(size)}, {LAYERS} layers", {"bytes": size})


class _UsedMemory(BackgroundSampler):
    """Context manager that keeps the most bytes of the device that are in use."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(SAMPLED_EVERY)
        self._cuda, self.most = cuda, 0

    def sample(self, seconds: float) -> None:
        """Read the device's memory once."""
        free, total = self._cuda.memory()
        self.most = max(self.most, total - free)


def build(workspace: Workspace) -> Outcome:
    """Build the engines, the LLM as one part, and measure time and memory of the device."""
    gpu = bundles.expect_gpu()
    options = BuildOptions(parts=1, verbose=True)
    started, before = time.perf_counter(), _used(gpu.cuda)
    with _UsedMemory(gpu.cuda) as memory:
        engines = bundles.build(bundle_of(workspace), gpu, options, plugins=False, part="full-size")
    seconds, most = time.perf_counter() - started, memory.most - before
    figures = {"seconds": seconds, "device_memory": most, "engines": engines.size}
    return Outcome(f"{seconds:.0f} s, {format_bytes(most)} of the device for {format_bytes(engines.size)}", figures)


def _used(cuda: Cuda) -> int:
    free, total = cuda.memory()
    return total - free


def run(workspace: Workspace) -> Outcome:
    """Load the engines and time vision, prefill and decode steps against a copy's bandwidth and a GEMM's throughput."""
    gpu = bundles.expect_gpu()
    target = Target(gpu.library, gpu.platform.compute_capability, gpu.cuda)
    matrices = gemm(GEMM_SIZE)
    multiplied = run_engine(target, build_engine(target, matrices).plan, matrices, "gemm", workspace)
    bandwidth, throughput = copy_bandwidth(gpu.cuda), 2 * GEMM_SIZE**3 / multiplied.seconds
    opened = open_bundle(bundle_of(workspace))
    before, started = _used(gpu.cuda), time.perf_counter()
    _, backend = open_device(opened, gpu.device)
    loaded = time.perf_counter() - started
    times = measure(backend, opened.manifest, loaded, STEPS, lambda: _used(gpu.cuda) - before)
    backend.close()
    manifest = opened.manifest
    prompt = prompt_tokens(manifest)
    case = Case(gpu.device, 0, QUERY_LENGTH, manifest.image_side**2, prompt, STEPS, prompt)
    shares = {
        "decode_step": moved_bytes(manifest, prompt + STEPS) / bandwidth / times.decode_step,
        "prefill": 2 * prefill_macs(manifest, case) / throughput / times.prefill,
        "vision": 2 * encoder_macs(manifest, GLOBAL_CROPS) / throughput / times.encode_global,
    }
    seconds = {"decode_step": times.decode_step, "prefill": times.prefill, "vision": times.encode_global}
    figures = {
        "copy_bandwidth": bandwidth,
        "gemm_flops": throughput,
        "load": times.load,
        "memory": times.memory,
        "prompt_tokens": prompt,
        "seconds": seconds,
        "roofline_shares": shares,
    }
    parts = (f"{name} {1e3 * took:.1f} ms ({shares[name]:.0%})" for name, took in seconds.items())
    return Outcome(f"load {loaded:.1f} s, {', '.join(parts)} of the roofline", figures)


def moved_bytes(manifest: Manifest, length: int) -> int:
    """Return the bytes that a decode step moves for a sequence of ``length`` tokens.

    A TensorRT without TensorScatter (before 10.15) also copies the whole cache.
    """
    return step_bytes(manifest, moved_tokens(length, manifest.max_context, manifest.has_per_token_scales))


def windows(workspace: Workspace) -> Outcome:
    """Time decode steps in every window of the KV cache, each nearly full, against a copy's bandwidth."""
    gpu = bundles.expect_gpu()
    opened = open_bundle(bundle_of(workspace))
    sizes = open_engines(opened, gpu.platform)[1].decode_windows
    if len(sizes) < 2:
        raise FusionError(f"The engines have one decode window ({sizes[0]} tokens); expected several.")
    bandwidth = copy_bandwidth(gpu.cuda)
    _, backend = open_device(opened, gpu.device)
    figures: dict[str, Any] = {"copy_bandwidth": bandwidth, "windows": {}}
    for size in sizes:
        length = size - 1 - STEPS
        seconds, moved = decode_step_behind(backend, opened.manifest, length, STEPS), moved_bytes(opened.manifest, size)
        share = moved / bandwidth / seconds
        figures["windows"][size] = {"tokens": length, "seconds": seconds, "bytes": moved, "roofline_share": share}
    backend.close()
    parts = (
        f"{size} tokens {1e3 * one['seconds']:.2f} ms for {format_bytes(one['bytes'])} ({one['roofline_share']:.0%})"
        for size, one in figures["windows"].items()
    )
    return Outcome(f"{', '.join(parts)} of a copy's bandwidth", figures)
