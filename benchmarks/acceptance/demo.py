"""The demo bundle, or links to that of ``--bundle``: engines with functions, then plugins, against the CPU's answer."""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from pathlib import Path
from typing import NoReturn

import numpy as np

from fusion_edge.benchmarks.acceptance import bundles
from fusion_edge.benchmarks.acceptance.steps import Outcome, SkippedStep, Workspace
from fusion_edge.benchmarks.latency.backend_stages import measure
from fusion_edge.benchmarks.latency.stages import make_up_picture
from fusion_edge.export.engines.builder import BuildOptions
from fusion_edge.runtime.answer import Answer
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.onnxruntime.library import find_onnxruntime, release_numbers
from fusion_edge.runtime.backends.tensorrt.backend import MAX_DIFFERENCE, TensorRTBackend
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import Cancelled, DeviceError, FusionError
from fusion_edge.runtime.formatting import format_bytes
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.loading import load
from fusion_edge.runtime.sampling import MAX_LOGPROBS, Sampling
from fusion_edge.runtime.stages import DECODE_STEP, PREFILL
from fusion_edge.runtime.tokenization.embeddings import Embeddings
from fusion_edge.runtime.tokenization.tokenizer import load_tokenizer

QUESTION, ANSWER = "What color is the circle?", "blue"
NEW_TOKENS = 16
STEPS = 32
CPU_ANSWER = "cpu-answer.json"
NO_CPU_ANSWER = "no-cpu-answer.txt"
"""File with the reason why this machine's CPU does not run the bundle."""
OPSET_24_SINCE = (1, 24)
"""First release of ONNX Runtime with the opset of bundles for TensorRT."""


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
    """Answer on the CPU, and keep the answer for the comparisons, or the reason why there is none."""
    if reason := _no_onnxruntime_reason():
        (workspace.scratch / NO_CPU_ANSWER).write_text(reason, encoding="utf-8")
        raise SkippedStep(f"The CPU does not run the bundle: {reason}")
    with load(bundle_of(workspace), device="cpu") as fusion:
        answer = _ask(workspace, fusion)
    if workspace.bundle is None and answer.text != ANSWER:
        raise FusionError(f"The demo model answers {answer.text!r} on the CPU, expected {ANSWER!r}.")
    (workspace.scratch / CPU_ANSWER).write_text(json.dumps(dataclasses.asdict(answer)), encoding="utf-8")
    return Outcome(f"{answer.text!r}", {"answer": answer.text})


def _no_onnxruntime_reason() -> str | None:
    """Return why ONNX Runtime cannot run bundles for TensorRT, as a sentence; None if it can."""
    try:
        version = find_onnxruntime().__version__
    except DeviceError as error:
        return str(error)
    if release_numbers(version) < OPSET_24_SINCE:
        return f"ONNX Runtime {version} has no opset 24; 1.24 and later have, for Python 3.11 and later."
    return None


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
    backend = TensorRTBackend(opened, gpu.library, cuda)
    step = measure(backend, opened.manifest, 0.0, STEPS, lambda: 0).decode_step
    with Fusion(opened.manifest, backend, load_tokenizer(opened), Embeddings(opened)) as fusion:
        answer = _ask(workspace, fusion)
    if workspace.bundle is None and answer.text != ANSWER:
        raise FusionError(f"The demo model answers {answer.text!r}, expected {ANSWER!r}.")
    difference, beside = compared(workspace, answer)
    figures = {"answer": answer.text, "decode_step": step, "difference": difference, "timings_ms": answer.timings_ms}
    return Outcome(f"{answer.text!r}, {beside}, decode step {1e3 * step:.2f} ms", figures)


def _ask(workspace: Workspace, fusion: Fusion) -> Answer:
    sampling = Sampling(max_new_tokens=NEW_TOKENS, logprobs=MAX_LOGPROBS)
    return fusion.answer(picture_of(workspace), QUESTION, sampling=sampling)


def compared(workspace: Workspace, answer: Answer) -> tuple[float | None, str]:
    """Return the largest difference of a log-probability to the CPU's, and words for it.

    None if this machine's CPU does not run the bundle; the words have the reason. Raises :class:`FusionError` for other
    tokens, a difference that float16 kernels do not explain, or if the step of the CPU's answer has failed.
    """
    path, reason = workspace.scratch / CPU_ANSWER, workspace.scratch / NO_CPU_ANSWER
    if reason.is_file():
        return None, f"not compared with the CPU ({reason.read_text(encoding='utf-8').rstrip('.')})"
    if not path.is_file():
        raise FusionError(
            f"The engines answer {answer.text!r}, and there is no answer of the CPU: step demo-cpu failed."
        )
    expected = json.loads(path.read_text(encoding="utf-8"))
    if list(answer.token_ids) != expected["token_ids"]:
        raise FusionError(f"The engines answer {answer.text!r}, and the CPU {expected['text']!r}.")
    pairs = [
        (value, theirs[str(token)])
        for ours, theirs in zip(answer.top_logprobs, expected["top_logprobs"], strict=True)
        for token, value in ours.items()
        if str(token) in theirs
    ]
    values = np.array(pairs)
    difference, limit = float(np.abs(values[:, 0] - values[:, 1]).max()), MAX_DIFFERENCE * float(values[:, 1].std())
    if not difference <= limit:
        raise FusionError(
            f"Log-probabilities differ from the CPU's by up to {difference:.3g}; expected at most {limit:.3g}."
        )
    return difference, f"largest difference to the CPU {difference:.4f}"


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
