"""The demo bundle, or links to that of ``--bundle``: engines with functions, then plugins, against the CPU's answer.

Other variants of the demo model have an int8 KV cache, or a vision encoder that computes in integers.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from pathlib import Path
from typing import Any, NoReturn

from fusion_edge.benchmarks.acceptance import activation_ranges, bundles
from fusion_edge.benchmarks.acceptance.steps import Outcome, SkippedStep, Workspace
from fusion_edge.benchmarks.latency.backend_stages import measure
from fusion_edge.benchmarks.latency.stages import make_up_picture
from fusion_edge.export.engines.builder import BuildOptions
from fusion_edge.export.engines.engine_check import compare_stages, no_cpu_outputs_reason
from fusion_edge.export.engines.stage_outputs import StageOutputs, StageRunner
from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.backends.onnxruntime.library import opset_24_unsupported_reason
from fusion_edge.runtime.backends.tensorrt.backend import TensorRTBackend
from fusion_edge.runtime.bundle.engine_manifest import Engines
from fusion_edge.runtime.bundle.engines import open_engines
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.errors import Cancelled, DeviceError, FusionError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.sampling import Sampling
from fusion_edge.runtime.stages import DECODE_STEP, PREFILL
from fusion_edge.runtime.tokenization.embeddings import Embeddings
from fusion_edge.runtime.tokenization.tokenizer import load_tokenizer

QUESTION, ANSWER = "What is at the top right?", "elephant"
NEW_TOKENS = 16
STEPS = 32
DEMO, INT8_CACHE, W8A8 = "demo", "demo-int8-cache", "demo-w8a8"
"""Variants: the default formats, or an int8 KV cache, or a vision encoder with 8-bit weights and activations."""


def bundle_of(workspace: Workspace, variant: str = DEMO) -> Path:
    """Return the bundle that :func:`export` makes."""
    return workspace.scratch / variant


def cpu_outputs_of(workspace: Workspace, variant: str = DEMO) -> Path:
    """Return the file with the CPU's outputs of every stage."""
    return workspace.scratch / f"{variant}-cpu-outputs.npz"


def no_cpu_outputs_of(workspace: Workspace, variant: str = DEMO) -> Path:
    """Return the file with the reason why nothing is compared with this machine's CPU."""
    return workspace.scratch / f"{variant}-no-cpu-outputs.txt"


def picture_of(workspace: Workspace) -> Path:
    """Return the demo model's picture, or a made-up one for another bundle."""
    if workspace.bundle is None:
        return bundles.DEMO / "picture.png"
    picture = workspace.scratch / "picture.jpg"
    make_up_picture(picture)
    return picture


def export(workspace: Workspace) -> Outcome:
    """Export the demo model for TensorRT, or link the files of ``--bundle``."""
    if workspace.bundle is not None:
        bundles.link(workspace.bundle, bundle_of(workspace))
        return Outcome(f"{workspace.bundle} is given")
    checkpoint = bundles.DEMO / "checkpoint"
    if not checkpoint.is_dir():
        raise SkippedStep(f"{bundles.ONLY_IN_A_CLONE}, or pass --bundle.")
    bundle = bundle_of(workspace)
    bundles.export(checkpoint, bundle, ())
    return Outcome(f"{format_bytes(open_bundle(bundle).manifest.size)} in INT4")


def export_variant(workspace: Workspace, variant: str) -> Outcome:
    """Export a variant of the demo model. :func:`export` has run."""
    if workspace.bundle is not None:
        raise SkippedStep("--bundle replaces the demo model; leave it out to check the variants of the demo model.")
    checkpoint, bundle = bundles.DEMO / "checkpoint", bundle_of(workspace, variant)
    if variant == INT8_CACHE:
        bundles.export(checkpoint, bundle, ("--kv-cache", "int8"))
        return Outcome(f"{format_bytes(open_bundle(bundle).manifest.size)}, KV cache in int8")
    if reason := opset_24_unsupported_reason():
        raise SkippedStep(f"The ranges of the activations are not known: {reason}")
    largest = activation_ranges.largest_inputs(open_bundle(bundle_of(workspace)), picture_of(workspace), QUESTION)
    activation_ranges.export_with_ranges(checkpoint, bundle, largest)
    formats = open_bundle(bundle).manifest.weights
    count = sum(fmt == "w8a8" for fmt in formats.values())
    return Outcome(f"{count} linears of the vision encoder in w8a8", {"ranges": largest})


def answer_on_cpu(workspace: Workspace, variant: str = DEMO) -> Outcome:
    """Answer on the CPU, and keep the outputs of every stage for the comparisons, or the reason why there are none."""
    opened = open_bundle(bundle_of(workspace, variant))
    if reason := no_cpu_outputs_reason(opened):
        no_cpu_outputs_of(workspace, variant).write_text(reason, encoding="utf-8")
        raise SkippedStep(f"There is no comparison with the CPU: {reason}")
    backend = OnnxRuntimeBackend(opened, "cpu")
    with Fusion(opened.manifest, backend, load_tokenizer(opened), Embeddings(opened)) as fusion:
        answer = _ask(workspace, fusion)
        StageRunner(opened, opened.manifest.max_context).run(backend).save(cpu_outputs_of(workspace, variant))
    if workspace.bundle is None and answer.text != ANSWER:
        raise FusionError(f"The demo model answers {answer.text!r} on the CPU, expected {ANSWER!r}.")
    return Outcome(f"{answer.text!r}", {"answer": answer.text})


def build(workspace: Workspace, plugins: bool, variant: str = DEMO) -> Outcome:
    """Build the engines, with functions or with plugins for the recursive alignment.

    Says which engines have float16 in place of INT8 that TensorRT does not build.
    """
    gpu = bundles.expect_gpu()
    options = BuildOptions(kernels=workspace.kernels if plugins else None, verbose=True)
    engines = bundles.build(bundle_of(workspace, variant), gpu, options, plugins=plugins, part="demo")
    replaced = "".join(f"; {name} in float16, for INT8 failed: {why}" for name, why in engines.float16_parts.items())
    if variant == W8A8 and not replaced:
        replaced = "; the vision encoder in INT8"
    figures = {"engines": engines.size, "float16_in_place_of_int8": engines.float16_parts}
    return Outcome(f"{gpu.platform}: {format_bytes(engines.size)}{replaced}", figures)


class _WithoutGraphs(Cuda):
    """CUDA on which no capture succeeds, so that decode steps run kernel by kernel."""

    def end_capture(self, stream: int) -> NoReturn:
        self.destroy_graph(super().end_capture(stream))
        raise DeviceError("graphs are off")


def run(workspace: Workspace, graphs: bool, variant: str = DEMO) -> Outcome:
    """Answer with the engines, compare with the CPU, and time decode steps, with CUDA graphs or without."""
    gpu = bundles.expect_gpu()
    cuda = gpu.cuda if graphs else _WithoutGraphs(importlib.import_module("cuda.bindings.runtime"))
    opened = open_bundle(bundle_of(workspace, variant))
    built = open_engines(opened, gpu.platform)
    backend = TensorRTBackend(opened, gpu.library, cuda, built)
    with Fusion(opened.manifest, backend, load_tokenizer(opened), Embeddings(opened)) as fusion:
        step = measure(backend, opened.manifest, 0.0, STEPS, lambda: 0).decode_step
        answer = _ask(workspace, fusion)
        if workspace.bundle is None and answer.text != ANSWER:
            raise FusionError(f"The demo model answers {answer.text!r}, expected {ANSWER!r}.")
        differences, beside = compared(workspace, opened, built[1], backend, variant)
    figures = {"answer": answer.text, "decode_step": step, "differences": differences, "timings_ms": answer.timings_ms}
    return Outcome(f"{answer.text!r}, {beside}, decode step {1e3 * step:.2f} ms", figures)


def _ask(workspace: Workspace, fusion: Fusion) -> Answer:
    return fusion.answer(picture_of(workspace), QUESTION, sampling=Sampling(max_new_tokens=NEW_TOKENS))


def compared(
    workspace: Workspace, bundle: Bundle, engines: Engines, backend: TensorRTBackend, variant: str = DEMO
) -> tuple[list[dict[str, Any]], str]:
    """Return the differences from the CPU by stage, and words for the largest.

    There are none if nothing is compared; the words have the reason. Raises :class:`FusionError` for differences that
    rounding does not explain, or if the step on the CPU has failed.
    """
    path, reason = cpu_outputs_of(workspace, variant), no_cpu_outputs_of(workspace, variant)
    if reason.is_file():
        return [], f"not compared with the CPU ({reason.read_text(encoding='utf-8').rstrip('.')})"
    if not path.is_file():
        raise FusionError(f"There are no outputs of the CPU to compare with: step {variant}-cpu failed.")
    stages = compare_stages(bundle, engines, backend, StageOutputs.load(path))
    largest = max(stages, key=lambda stage: stage.relative_error / stage.limit)
    words = f"differs from the CPU by {largest.relative_error:.1e} of at most {largest.limit:.1e} in {largest.stage}"
    return [dataclasses.asdict(stage) for stage in stages], words


def cancel(workspace: Workspace) -> Outcome:
    """Cancel a question in its prefill and in its answer; the next answer must be complete."""
    gpu = bundles.expect_gpu()
    figures: dict[str, float] = {}
    with load(bundle_of(workspace), device=gpu.device) as fusion:
        expected = _ask(workspace, fusion).token_ids
        for stage in (PREFILL, DECODE_STEP):
            figures[stage] = _cancel_in(workspace, fusion, stage)
            if _ask(workspace, fusion).token_ids != expected:
                raise FusionError(f"The answer after a cancel in {stage} is not that before it.")
    return Outcome(", ".join(f"{stage} {1e3 * seconds:.1f} ms" for stage, seconds in figures.items()), figures)


def _cancel_in(workspace: Workspace, fusion: Fusion, stage: str) -> float:
    """Cancel a question as a stage of it begins; return the seconds until it ended."""
    canceled = 0.0

    def cancel_once(entered: str) -> None:
        nonlocal canceled
        if entered == stage and not canceled:
            canceled = time.perf_counter()
            fusion.cancel()

    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    try:
        answer = fusion.answer(picture_of(workspace), QUESTION, sampling=sampling, on_stage=cancel_once)
    except Cancelled as ended:  # before the first token
        answer = ended.partial
    seconds = time.perf_counter() - canceled
    if answer.finish_reason != "cancelled":
        raise FusionError(f"A question that was canceled in {stage} ended with {answer.finish_reason!r}.")
    return seconds
