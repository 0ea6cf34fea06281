"""Errors of TensorRT: sizes, runs, loads, contexts and memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fakes.fake_cuda import Error, FakeCuda
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.fake_tensorrt_runtime import IExecutionContext
from fakes.on_fake_tensorrt import OnFake, build, open_backend
from support.backend_contract import CAPACITY, Subject
from support.opset24 import needs_opset_24

from fusion_edge.runtime import FusionError
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError

pytestmark = needs_opset_24  # the fake of TensorRT computes with it


def test_sizes_outside_the_profiles_are_refused(subject: Subject, bundle: Bundle) -> None:
    """The previous sequence continues after a refusal."""
    rows, context = subject.start(), bundle.manifest.max_context
    image = subject.image()
    long = np.zeros((context + 1, subject.width), np.float32)
    latents, questions = np.arange(4)[None], np.array([5])
    many = np.tile(latents, (16, 1)), np.arange(16)

    def prefill(length: int, places: tuple[object, object], capacity: int) -> None:
        subject.backend.prefill(long[:length], image, *places, capacity)  # type: ignore[arg-type]

    refusals: dict[str, Callable[[], object]] = {
        "has 497 tokens of all questions, and the engines support 0 to 496": lambda: subject.backend.encode(
            np.zeros((1, 3, 384, 384), np.float32),
            np.zeros((1, 497, subject.width), np.float32),
            np.ones((1, 497), np.bool_),
        ),
        "has 16 questions of the conversation, and the engines support 0 to 15": lambda: prefill(64, many, CAPACITY),
        "sequence of 513 tokens exceeds the engines' context of 512; build with a larger --max-context.": (
            lambda: prefill(64, (latents, questions), context + 1)
        ),
        "has 17 latents per question, and the engines support 0 to 16": (
            lambda: prefill(64, (np.arange(17)[None], questions), CAPACITY)
        ),
        "The sequence has 513 tokens, more than its capacity of 512": (
            lambda: prefill(context + 1, (latents, questions), context)
        ),
    }
    for message, refused in refusals.items():
        with pytest.raises(FusionError, match=message):
            refused()
    assert np.isfinite(subject.backend.decode(rows[0])).all()


def test_tensorrt_fails_to_run(on_fake: OnFake, subject: Subject) -> None:
    on_fake.trt.run_error = "Cuda Runtime (an illegal instruction was encountered)"
    with pytest.raises(FusionError, match=r"^tensorrt_rtx failed to run vision_encoder: Cuda Runtime \(.*\)\.$"):
        subject.encode(1, 0)
    on_fake.trt.run_error = None
    subject.start()


def test_tensorrt_fails_to_load(bundle: Bundle) -> None:
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    trt.load_error = "Cannot allocate\n  memory."
    with pytest.raises(
        FusionError,
        match=r"cannot load .*vision_encoder\.engine: Cannot allocate memory\. If memory ran out, close other programs",
    ):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()


def test_tensorrt_fails_to_create_a_context(bundle: Bundle) -> None:
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    trt.context_error = "Requested amount of GPU memory could not be allocated."
    with pytest.raises(FusionError, match=r"^tensorrt_rtx failed to prepare vision_encoder: Requested amount of GPU"):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()


def test_tensorrt_fails_to_bind_a_tensor(on_fake: OnFake, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, image = subject.start(), subject.image()
    monkeypatch.setattr(IExecutionContext, "set_tensor_address", lambda *_: False)
    with pytest.raises(FusionError, match=r"^tensorrt_rtx failed to bind the tensors of llm: it gives no reason\.$"):
        subject.backend.prefill(rows, image, np.arange(4)[None], np.array([5]), CAPACITY)


def test_memory_runs_out_during_the_load(bundle: Bundle) -> None:
    """The backend frees everything it has allocated."""
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    trt.cuda.failures["cudaMalloc"] = Error.cudaErrorMemoryAllocation
    with pytest.raises(DeviceError, match=r"^CUDA's cudaMalloc failed: cudaErrorMemoryAllocation of the fake\.$"):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()
