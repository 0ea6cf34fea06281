"""Compare engines with the same bundle on the CPU, stage by stage, on the GPU that runs them.

Both compute in float16 from the same weights, so only rounding may differ. docs/tensorrt.md derives the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from fusion_edge.export.engines.stage_outputs import RUN_STEPS, ReadableBackend, Reference, StageOutputs, StageRunner
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.backends.cuda import open_cuda
from fusion_edge.runtime.backends.onnxruntime.library import opset_24_unsupported_reason
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.backends.tensorrt.memory_estimate import DeviceMemoryError, check_device_memory
from fusion_edge.runtime.bundle.engine_manifest import (
    EngineCheck,
    EnginePlatform,
    Engines,
    LogitDifference,
    StageDifference,
)
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError, FusionError, printable
from fusion_edge.runtime.formatting import format_table
from fusion_edge.runtime.logprobs import divergences, log_softmax
from fusion_edge.runtime.stages import ALIGNMENT, DECODE_STEP, ENCODE_GLOBAL, ENCODE_LOCAL, PREFILL
from fusion_edge.runtime.system.progress import Progress
from fusion_edge.runtime.system.resources import available_memory, not_enough_memory

SCENE = "prefill in a scene"
HALF_ROUNDING = 2.0**-11
"""Rounding to float16, relative."""
ROUNDINGS = 24
"""Roundings to float16 of a layer: about 12 operators, and both sides round each."""
INT8_FLIP, INT8_ROUNDING = 2.0**-8, 2.0**-7
"""Rounding to 8 bits of activations, and of keys and values, relative to their norm: where both sides do it, and where
only the CPU does."""
INT8_ROUNDINGS = 4
"""Quantized inputs of a layer."""
CACHE_ROUNDINGS = 2
"""Quantized keys and values of a layer with an int8 KV cache."""
GROWTH = 4
"""Most growth of an error in later layers, and from mean to largest."""
CPU_MEMORY = 3
"""Bytes that the CPU needs for a byte of the bundle: ONNX Runtime copies float16 weights as float32 (measured: 2.8)."""
CHUNK = 1 << 20
"""Numbers compared at once. The keys of an image at 3B would need a quarter of a gigabyte in float64."""
ACTIVATIONS_8_BIT = "w8a8"
ACTIVATIONS_4_BIT = "nvfp4"
PREFIXES = {VISION_ENCODER: ("vision.",), ALIGNMENT_DECODER: ("alignment.",), LLM: ("llm.", "alignment.")}
"""Starts of the names of a graph's weights. The decoder and the LLM share the interaction layers."""


class WrongEnginesError(FusionError):
    """A stage of the engines differs from the CPU's by more than rounding."""


def incomparable_reason(bundle: Bundle) -> str | None:
    """Return why no limit tells right engines of a bundle from wrong ones, as a sentence; None if limits do."""
    if ACTIVATIONS_4_BIT not in bundle.manifest.weights.values():
        return None
    return (
        "Activations in nvfp4 have 4 bits, so right engines may differ from the CPU as wrong ones do; compare answers "
        "with those of --device cpu."
    )


def no_memory_reason(bundle: Bundle) -> str | None:
    """Return that memory does not suffice to run a bundle on the CPU, as a sentence; None if it does."""
    needed = CPU_MEMORY * bundle.manifest.size
    if needed <= available_memory():
        return None
    return f"{not_enough_memory('run the bundle on the CPU', needed)}."


def no_cpu_outputs_reason(bundle: Bundle) -> str | None:
    """Return why this CPU makes no outputs of a bundle to compare with, as a sentence; None if it does."""
    return opset_24_unsupported_reason() or incomparable_reason(bundle) or no_memory_reason(bundle)


def skipped_reason(
    bundle: Bundle, platform: EnginePlatform, is_wanted: bool, has_reference: bool = False
) -> str | None:
    """Return why engines for ``platform`` cannot be compared on this machine, as a sentence; None if they can.

    With a reference, the CPU need not run the bundle.
    """
    if not is_wanted:
        return "--skip-comparison was given."
    if reason := incomparable_reason(bundle):
        return reason
    try:
        here = open_cuda().compute_capability()
    except DeviceError as error:
        return str(error)
    if here != platform.compute_capability:
        return f"This machine's GPU has compute capability {here}, and the engines are for another."
    return None if has_reference else opset_24_unsupported_reason()


def run_on_cpu(bundle: Bundle, max_context: int, advance: Callable[[int], None]) -> StageOutputs:
    """Run the question on ONNX Runtime's CPU provider. ``advance`` receives 1 for loading and for each stage.

    Raises :class:`FusionError` if the CPU does not run the bundle, or not with this context.
    """
    from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend  # imports onnxruntime

    with closing(OnnxRuntimeBackend(bundle, "cpu")) as backend:
        advance(1)
        return StageRunner(bundle, max_context, advance).run(backend)


def compare_with_cpu(
    bundle: Bundle, library: Library, folder: Path, engines: Engines, reference: Reference | None = None
) -> EngineCheck:
    """Run a question on ONNX Runtime's CPU provider, then on the engines in ``folder``, and return the differences.

    The two never lie in memory together. A reference has the CPU's outputs already. Where the CPU does not run the
    bundle, or memory does not suffice for either, nothing is compared: the engines may be right.

    Raises :class:`WrongEnginesError` if a stage differs by more than rounding, :class:`FusionError` if the engines do
    not load.
    """
    from fusion_edge.runtime.backends.tensorrt.backend import TensorRTBackend

    cuda = open_cuda()
    if reference is None and (reason := no_memory_reason(bundle)) is not None:
        return EngineCheck(reason, ())
    try:
        check_device_memory(bundle.manifest, engines, cuda)
    except DeviceMemoryError as error:
        return EngineCheck(str(error), ())
    runs = 2 if reference is None else 1
    with Progress("Comparing with the CPU", runs * RUN_STEPS, unit=None) as progress:
        try:
            expected = _expected(bundle, engines, reference, progress.advance)
        except FusionError as error:
            reason = "The CPU does not run the bundle" if reference is None else "The context is too small"
            return EngineCheck(f"{reason}: {error}", (), is_final=True)
        try:
            with closing(TensorRTBackend(bundle, library, cuda, (folder, engines))) as backend:
                progress.advance(1)
                stages = compare_stages(bundle, engines, backend, expected, progress.advance)
                return EngineCheck(None, stages, reference=None if reference is None else reference.made_by)
        except DeviceMemoryError as error:  # another program has taken it meanwhile
            return EngineCheck(str(error), ())


def _expected(
    bundle: Bundle, engines: Engines, reference: Reference | None, advance: Callable[[int], None]
) -> StageOutputs:
    """Return the CPU's outputs. Raise :class:`FusionError` if there are none for the context of the engines."""
    if reference is None:
        return run_on_cpu(bundle, engines.max_context, advance)
    StageRunner(bundle, engines.max_context).check_context()
    return reference.outputs


def compare_stages(
    bundle: Bundle,
    engines: Engines,
    backend: ReadableBackend,
    expected: StageOutputs,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[StageDifference, ...]:
    """Run the question on loaded engines, and return their differences from the CPU's outputs, in running order.

    ``advance`` receives 1 for each stage and each step that ran.
    Raises :class:`WrongEnginesError` with stage and remedy if one differs by more than rounding.
    """
    runner = StageRunner(bundle, engines.max_context, advance)
    actual = runner.run(backend, expected)
    expected = expected.first_steps(len(actual.steps))  # the context of the engines may be smaller
    stages = stage_differences(bundle, engines, actual, runner.ask_scene(backend), expected)
    for stage in stages:
        _check(stage, bundle, engines)
    return stages


def stage_differences(
    bundle: Bundle, engines: Engines, actual: StageOutputs, scene: Floats, expected: StageOutputs
) -> tuple[StageDifference, ...]:
    """Return the differences of the engines' outputs from the CPU's, in running order."""
    vision, alignment, llm = _squared_roundings(bundle, engines)
    features = (
        (ENCODE_GLOBAL, vision, [(actual.global_features, expected.global_features)]),
        (ENCODE_LOCAL, vision, [(actual.image_tokens, expected.image_tokens)]),
        (ALIGNMENT, alignment, list(zip(actual.alignment, expected.alignment, strict=True))),
    )
    logits = (
        (PREFILL, alignment + llm, actual.prompt, expected.prompt),
        (DECODE_STEP, alignment + llm, actual.steps, expected.steps),
        (SCENE, vision + alignment + llm, scene, expected.prompt),
    )
    return (
        *(
            StageDifference(stage, float(np.max([relative_error(*pair) for pair in pairs])), _limit(squared), None)
            for stage, squared, pairs in features
        ),
        *(_of_logits(stage, _limit(squared), ours, theirs) for stage, squared, ours, theirs in logits if len(theirs)),
    )


def _squared_roundings(bundle: Bundle, engines: Engines) -> tuple[float, float, float]:
    """Return the sums of the squared roundings of vision encoder, alignment decoder and LLM, of both sides together.

    A vision encoder has its projector as one layer more. The LLM has the interaction layers, too.
    """
    config, replaced = bundle.manifest.model, engines.float16_parts
    layers = {
        VISION_ENCODER: config.vision.layers + 1,
        ALIGNMENT_DECODER: 1,
        LLM: config.language.layers + config.alignment.layers,
    }

    cache = CACHE_ROUNDINGS * INT8_FLIP**2 * config.language.layers if bundle.manifest.has_per_token_scales else 0.0

    def squared(graph: str) -> float:
        is_replaced = any(engine.file.path in replaced for engine in engines.engines[graph])
        int8 = 0.0
        if ACTIVATIONS_8_BIT in _formats(bundle, graph):
            int8 = INT8_ROUNDING if is_replaced else INT8_FLIP
        return layers[graph] * (ROUNDINGS * HALF_ROUNDING**2 + INT8_ROUNDINGS * int8**2)

    return squared(VISION_ENCODER), squared(ALIGNMENT_DECODER), squared(LLM) + cache


def _formats(bundle: Bundle, graph: str) -> set[str]:
    """Return the formats of a graph's weights."""
    return {one for name, one in bundle.manifest.weights.items() if name.startswith(PREFIXES[graph])}


def _limit(squared_roundings: float) -> float:
    return GROWTH * math.sqrt(squared_roundings)


def relative_error(actual: Floats, expected: Floats) -> float:
    """Return the norm of the difference relative to that of ``expected``; NaN if an element is not finite."""
    ours, theirs, squares = actual.reshape(-1), expected.reshape(-1), np.zeros(2)
    with np.errstate(all="ignore"):
        for start in range(0, expected.size, CHUNK):
            wide = theirs[start : start + CHUNK].astype(np.float64)
            squares += np.sum((ours[start : start + CHUNK] - wide) ** 2), np.sum(wide**2)
        error = float(np.sqrt(squares[0] / squares[1]))
    return error if math.isfinite(error) else math.nan


def _of_logits(stage: str, limit: float, actual: Floats, expected: Floats) -> StageDifference:
    """Compare logits ``[n,V]``: relative to their means, which a softmax ignores, and as distributions.

    Logits that differ by d have distributions with a KL divergence of half the variance of d.
    """
    with np.errstate(all="ignore"):
        ours, theirs = (logits - logits.mean(-1, keepdims=True) for logits in (actual, expected))
        error = float(np.max([relative_error(*pair) for pair in zip(ours, theirs, strict=True)]))
        divergence = float(divergences(log_softmax(expected), log_softmax(actual)).max())
    largest = float(theirs.std(-1).max())
    same = int((actual.argmax(-1) == expected.argmax(-1)).sum())
    found = LogitDifference(divergence, (limit * largest) ** 2 / 2, same, len(expected))
    return StageDifference(stage, error, limit, found)


def _check(difference: StageDifference, bundle: Bundle, engines: Engines) -> None:
    """Raise :class:`WrongEnginesError` unless rounding explains a difference. NaN is never explained."""
    stage, logits = difference.stage, difference.logits
    if not difference.relative_error <= difference.limit:
        found = f"relative error {difference.relative_error:.2g}, at most {difference.limit:.2g} expected"
    elif logits is not None and not logits.kl_divergence <= logits.kl_limit:
        found = f"KL divergence {logits.kl_divergence:.2g} nats, at most {logits.kl_limit:.2g} expected"
    else:
        return
    is_vision = stage in (ENCODE_GLOBAL, ENCODE_LOCAL)
    has_int8 = is_vision and ACTIVATIONS_8_BIT in _formats(bundle, VISION_ENCODER)
    remedy = "export with --vision fp16, or " if has_int8 else ""
    raise WrongEnginesError(
        f"The engines for {engines.machine} are wrong in {stage}: they differ from the CPU by more than rounding "
        f"({found}). Run the bundle with --device cpu, or {remedy}build with another version of TensorRT, and report "
        "this. --skip-comparison builds nevertheless."
    )


def check_text(check: EngineCheck) -> str:
    """Return a table of the differences, or one line with the reason why there is none."""
    if check.skipped is not None:
        return printable(f"not compared with the CPU: {check.skipped}") + "\n"
    beside = "the CPU" if check.reference is None else printable(check.reference)
    rows = [(f"compared with {beside}", "error", "limit", "KL", "same token")]
    for one in check.stages:
        logits = one.logits
        divergence = "" if logits is None else f"{logits.kl_divergence:.1e}"
        same = "" if logits is None else f"{logits.same_tokens}/{logits.tokens}"
        rows.append((printable(one.stage), f"{one.relative_error:.1e}", f"{one.limit:.1e}", divergence, same))
    return format_table(rows)
