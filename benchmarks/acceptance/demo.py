"""The demo bundle, or links to that of ``--bundle``: engines with functions, then plugins, against the CPU's answer."""

from __future__ import annotations

import dataclasses
import importlib
import time
from pathlib import Path
from typing import Any, NoReturn

from fusion_edge.benchmarks.acceptance import bundles
from fusion_edge.benchmarks.acceptance.steps import Outcome, SkippedStep, Workspace
from fusion_edge.benchmarks.latency.backend_stages import measure
from fusion_edge.benchmarks.latency.stages import make_up_picture
from fusion_edge.export.engines.builder import BuildOptions
from fusion_edge.export.engines.engine_check import compare_stages, incomparable_reason
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
CPU_OUTPUTS = "cpu-outputs.npz"
NO_CPU_OUTPUTS = "no-cpu-outputs.txt"
"""File with the reason why nothing is compared with this machine's CPU."""


def bundle_of(workspace: Workspace) -> Path:
    """Return the bundle that :func:`export` makes."""
    return workspace.scratch / "demo"


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


def answer_on_cpu(workspace: Workspace) -> Outcome:
    """Answer on the CPU, and keep the outputs of every stage for the comparisons, or the reason why there are none."""
    folder = bundle_of(workspace)
    if reason := opset_24_unsupported_reason() or incomparable_reason(open_bundle(folder)):
        (workspace.scratch / NO_CPU_OUTPUTS).write_text(reason, encoding="utf-8")
        raise SkippedStep(f"There is no comparison with the CPU: {reason}")
    opened = open_bundle(folder)
    backend = OnnxRuntimeBackend(opened, "cpu")
    with Fusion(opened.manifest, backend, load_tokenizer(opened), Embeddings(opened)) as fusion:
        answer = _ask(workspace, fusion)
        StageRunner(opened, opened.manifest.max_context).run(backend).save(workspace.scratch / CPU_OUTPUTS)
    if workspace.bundle is None and answer.text != ANSWER:
        raise FusionError(f"The demo model answers {answer.text!r} on the CPU, expected {ANSWER!r}.")
    return Outcome(f"{answer.text!r}", {"answer": answer.text})


def build(workspace: Workspace, plugins: bool) -> Outcome:
    """Build the engines, with functions or with plugins for the recursive alignment."""
    gpu = bundles.expect_gpu()
    options = BuildOptions(kernels=workspace.kernels if plugins else None, verbose=True)
    engines = bundles.build(bundle_of(workspace), gpu, options, plugins=plugins)
    return Outcome(f"{gpu.platform}: {format_bytes(engines.size)}", {"engines": engines.size})


class _WithoutGraphs(Cuda):
    """CUDA on which no capture succeeds, so that decode steps run kernel by kernel."""

    def end_capture(self, stream: int) -> NoReturn:
        self.destroy_graph(super().end_capture(stream))
        raise DeviceError("graphs are off")


def run(workspace: Workspace, graphs: bool) -> Outcome:
    """Answer with the engines, compare with the CPU, and time decode steps, with CUDA graphs or without."""
    gpu = bundles.expect_gpu()
    cuda = gpu.cuda if graphs else _WithoutGraphs(importlib.import_module("cuda.bindings.runtime"))
    opened = open_bundle(bundle_of(workspace))
    built = open_engines(opened, gpu.platform)
    backend = TensorRTBackend(opened, gpu.library, cuda, built)
    with Fusion(opened.manifest, backend, load_tokenizer(opened), Embeddings(opened)) as fusion:
        step = measure(backend, opened.manifest, 0.0, STEPS, lambda: 0).decode_step
        answer = _ask(workspace, fusion)
        if workspace.bundle is None and answer.text != ANSWER:
            raise FusionError(f"The demo model answers {answer.text!r}, expected {ANSWER!r}.")
        differences, beside = compared(workspace, opened, built[1], backend)
    figures = {"answer": answer.text, "decode_step": step, "differences": differences, "timings_ms": answer.timings_ms}
    return Outcome(f"{answer.text!r}, {beside}, decode step {1e3 * step:.2f} ms", figures)


def _ask(workspace: Workspace, fusion: Fusion) -> Answer:
    return fusion.answer(picture_of(workspace), QUESTION, sampling=Sampling(max_new_tokens=NEW_TOKENS))


def compared(
    workspace: Workspace, bundle: Bundle, engines: Engines, backend: TensorRTBackend
) -> tuple[list[dict[str, Any]], str]:
    """Return the differences from the CPU by stage, and words for the largest.

    There are none if nothing is compared; the words have the reason. Raises :class:`FusionError` for differences that
    rounding does not explain, or if the step on the CPU has failed.
    """
    path, reason = workspace.scratch / CPU_OUTPUTS, workspace.scratch / NO_CPU_OUTPUTS
    if reason.is_file():
        return [], f"not compared with the CPU ({reason.read_text(encoding='utf-8').rstrip('.')})"
    if not path.is_file():
        raise FusionError("There are no outputs of the CPU to compare with: step demo-cpu failed.")
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
