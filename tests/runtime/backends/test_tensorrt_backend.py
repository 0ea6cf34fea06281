"""The TensorRT backend on fakes of TensorRT and CUDA: memory, streams, lifetimes and errors."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_cuda import Error, FakeCuda
from fakes.fake_tensorrt import FULL, RTX, FakeTensorRT
from fakes.fake_tensorrt_runtime import IExecutionContext
from fakes.on_fake_tensorrt import OnFake, build, installed, open_backend, open_on_fake
from support.backend_contract import CAPACITY, HALF, Subject
from support.demo_model import ANSWER, OTHER_QUESTION, PICTURE, QUESTION
from support.locked_memory import locked_bytes
from support.opset24 import needs_opset_24
from support.paths import DEMO_CHECKPOINT

from fusion_edge.export import cli
from fusion_edge.runtime import FusionError, load
from fusion_edge.runtime.backends import devices
from fusion_edge.runtime.backends.base import Floats, KvPrefix
from fusion_edge.runtime.bundle.manifest import EMBEDDINGS
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.cli import run as cli_run

pytestmark = needs_opset_24  # the fake of TensorRT computes with it
STEP = ["cudaGraphLaunch", "cudaStreamSynchronize"]


# Lifetimes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [RTX, FULL], ids=lambda library: library[0])
def test_objects_are_freed_after_their_users(bundle: Bundle, library: tuple[str, str]) -> None:
    """Configurations outlive contexts, engines outlive configurations, also during a close."""
    fake = open_on_fake(bundle, *library, "--parts=2")
    Subject(fake.backend, bundle.manifest, HALF).start()
    gc.collect()
    assert fake.trt.released_early == []
    fake.backend.close()
    assert fake.trt.released_early == []


@pytest.mark.parametrize("contexts", [1, 2, 4])
@pytest.mark.parametrize("library", [RTX, FULL], ids=lambda library: library[0])
def test_objects_are_freed_after_their_users_if_a_load_fails(
    bundle: Bundle, library: tuple[str, str], contexts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out after the given number of contexts."""
    trt = FakeTensorRT(*library, FakeCuda())
    assert build(bundle, trt, "--force", "--parts=2") == 0
    made: list[int] = []

    def out_of_memory(context: IExecutionContext, *_: int) -> bool:
        made.append(id(context))
        return len(made) < contexts

    monkeypatch.setattr(IExecutionContext, "set_optimization_profile_async", out_of_memory)
    with pytest.raises(FusionError, match="failed to prepare"):
        open_backend(bundle, trt)
    assert len(made) == contexts
    assert trt.released_early == []
    trt.cuda.check_all_freed()


# Wrong results of TensorRT -------------------------------------------------------------------------------------


def test_a_cache_that_is_not_updated_in_place_is_detected(bundle: Bundle) -> None:
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt, "--parts=2") == 0
    trt.forgets_caches = True
    with pytest.raises(FusionError, match=r"^Decode and prefill of tensorrt_rtx .* disagree"):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()


# Memory and streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["1", "3"])
def test_a_decode_step_is_one_launch(bundle: Bundle, parts: str) -> None:
    fake = open_on_fake(bundle, *RTX, "--parts", parts)
    subject = Subject(fake.backend, bundle.manifest, HALF)
    rows = subject.start()
    runs = fake.trt.runs
    for count in range(1, 4):
        fake.cuda.calls.clear()
        fake.backend.decode(rows[count])
        assert fake.cuda.calls == STEP
        assert fake.trt.runs == runs + count * int(parts)
    fake.backend.close()
    fake.cuda.check_all_freed()


def test_memory_is_allocated_once(on_fake: OnFake, subject: Subject) -> None:
    """Later images reuse the memory of the first one, unless it is still in use."""
    rows = subject.start()
    used, count = on_fake.cuda.used, len(on_fake.cuda.allocations)
    for crops, words in ((1, 0), (4, 7)):
        subject.encode(crops, words)
        subject.start()
        subject.backend.decode(rows[0])
    assert (on_fake.cuda.used, len(on_fake.cuda.allocations)) == (used, count)


def test_memory_of_a_freed_image_is_reused(on_fake: OnFake, subject: Subject) -> None:
    first, second = subject.image(), subject.image()
    pointers = {(image.keys.pointer, image.values.pointer) for image in (first, second)}
    assert len({pointer for pair in pointers for pointer in pair}) == 4
    count = len(on_fake.cuda.allocations)
    del first
    gc.collect()
    third = subject.image()
    assert (third.keys.pointer, third.values.pointer) in pointers - {(second.keys.pointer, second.values.pointer)}
    assert len(on_fake.cuda.allocations) == count


def test_an_image_freed_after_the_backend(bundle: Bundle) -> None:
    """Its memory is not freed twice."""
    fake = open_on_fake(bundle, *RTX)
    image = Subject(fake.backend, bundle.manifest, HALF).image()
    fake.backend.close()
    del image
    gc.collect()
    fake.cuda.check_all_freed()


def interrupt_in(on_fake: OnFake, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], after: int) -> None:
    """Interrupt ``run`` after the given number of partitions or decode steps, and resume."""
    wait, waits = on_fake.cuda.cudaStreamSynchronize, itertools.count(1)

    def interrupting(stream: int) -> object:
        if next(waits) == after:
            on_fake.backend.interrupt()
        return wait(stream)

    with monkeypatch.context() as patch:
        patch.setattr(on_fake.cuda, "cudaStreamSynchronize", interrupting)
        with pytest.raises(FusionError, match=r"^The run was interrupted; ask the question again\.$"):
            run()
    on_fake.backend.resume()


def test_an_interrupt_acts_between_partitions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later runs give the same results in the same memory."""
    fake = open_on_fake(bundle, *RTX, "--parts=3")
    subject = Subject(fake.backend, bundle.manifest, HALF)
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)

    def prefill() -> Floats:
        logits: Floats = subject.backend.prefill(rows, image, latents, questions, CAPACITY).copy()
        return logits

    expected, used, runs = prefill(), fake.cuda.used, fake.trt.runs
    for partitions in (1, 2):
        interrupt_in(fake, monkeypatch, prefill, partitions)
        runs += partitions
        assert fake.trt.runs == runs
    assert np.array_equal(prefill(), expected)
    assert fake.cuda.used == used
    fake.backend.close()
    fake.cuda.check_all_freed()


def test_an_interrupt_acts_between_decode_steps(
    on_fake: OnFake, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = subject.start()
    expected = [subject.backend.decode(row).copy() for row in rows[:3]]

    def decode() -> None:
        for row in rows[:3]:
            subject.backend.decode(row)

    subject.start()
    runs = on_fake.trt.runs
    interrupt_in(on_fake, monkeypatch, decode, 2)
    assert on_fake.trt.runs == runs + 2
    subject.start()
    for row, logits in zip(rows[:3], expected, strict=True):
        assert np.array_equal(subject.backend.decode(row), logits)


def test_an_interrupted_alignment_leaks_no_memory(on_fake: OnFake, subject: Subject) -> None:
    features = subject.encode(4, 0)
    subject.align(features, 4)
    used = on_fake.cuda.used
    for _ in range(3):
        on_fake.backend.interrupt()
        with pytest.raises(FusionError, match="The run was interrupted"):
            subject.align(features, 4)
        on_fake.backend.resume()
    subject.align(features, 4)
    assert on_fake.cuda.used == used


def test_a_prefix_is_copied_only_when_it_is_elsewhere(on_fake: OnFake, subject: Subject) -> None:
    image = subject.image()
    prompt = subject.prompt(image, 1)
    (_, first), (_, second) = subject.prefix(), subject.prefix(8)

    def copies(prefix: KvPrefix | None) -> int:
        """Return the copies of a prompt behind a prefix, in caches."""
        on_fake.cuda.calls.clear()
        rows, latents, questions = prompt
        subject.backend.prefill(rows, image, latents, questions, subject.backend.max_context, prefix)
        return on_fake.cuda.calls.count("cudaMemcpy2DAsync")

    caches = 2 * subject.manifest.model.language.layers
    order = (second, second, first, first, None, None, first)
    assert [copies(prefix) for prefix in order] == [0, 0, caches, 0, 0, 0, caches]


def test_a_prefix_whose_copy_failed_is_copied_again(on_fake: OnFake, subject: Subject) -> None:
    """Neither it nor the one before is taken for what the cache holds."""
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    (_, first), (_, second) = subject.prefix(), subject.prefix(8)

    def logits(prefix: KvPrefix) -> Floats:
        capacity = subject.backend.max_context
        found: Floats = subject.backend.prefill(rows, image, latents, questions, capacity, prefix).copy()
        return found

    expected = logits(first), logits(second)
    for prefix, behind in zip((first, second), expected, strict=True):
        on_fake.cuda.failures["cudaMemcpy2DAsync"] = Error.cudaErrorInvalidValue
        with pytest.raises(FusionError):
            logits(first)
        on_fake.cuda.failures.clear()
        on_fake.cuda.calls.clear()
        assert np.array_equal(logits(prefix), behind)
        assert "cudaMemcpy2DAsync" in on_fake.cuda.calls
        logits(second)


def test_memory_of_a_freed_prefix_is_reused(on_fake: OnFake, subject: Subject) -> None:
    """That of another length is freed first."""
    (_, first), (_, second) = subject.prefix(), subject.prefix(8)
    pointers, used, count = {first.memory, second.memory}, on_fake.cuda.used, len(on_fake.cuda.allocations)
    del first
    gc.collect()
    _, third = subject.prefix(9)
    assert {second.memory, third.memory} == pointers
    assert (on_fake.cuda.used, len(on_fake.cuda.allocations)) == (used, count)
    del second, third
    gc.collect()
    shorter = subject.backend.prefill_prefix(np.zeros((2, subject.width), np.float32))
    assert used - on_fake.cuda.used > shorter.length * subject.manifest.model.language.cache_values * 2


@pytest.mark.parametrize("failure", ["TensorRT", "CUDA"])
def test_decode_steps_without_a_cuda_graph(
    bundle: Bundle, subject: Subject, capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    """Without a capture there is one warning, and steps give the same logits."""
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    if failure == "TensorRT":
        trt.refuses_capture, reason = True, "tensorrt_rtx failed to run llm: This cannot be captured."
    else:
        trt.cuda.failures["cudaGraphInstantiate"] = Error.cudaErrorInvalidValue
        reason = "CUDA's cudaGraphInstantiate failed: cudaErrorInvalidValue of the fake."
    capsys.readouterr()
    backend = open_backend(bundle, trt)
    assert capsys.readouterr().err == f"warning: decode steps run without a CUDA graph: {reason}\n"
    rows = subject.start()
    Subject(backend, bundle.manifest, HALF).start()
    for row in rows[:2]:
        assert np.array_equal(backend.decode(row), subject.backend.decode(row))
    backend.close()
    trt.cuda.check_all_freed()


def test_an_incomplete_step_is_not_captured(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT may fail although CUDA succeeds."""
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt, "--parts=1") == 0
    begin, end = trt.cuda.cudaStreamBeginCapture, trt.cuda.cudaStreamEndCapture

    def refuse_from_here(*arguments: object) -> object:
        trt.run_error = "out of resources"
        return begin(*arguments)  # type: ignore[arg-type]

    def refuse_no_longer(*arguments: object) -> object:
        trt.run_error = None
        return end(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trt.cuda, "cudaStreamBeginCapture", refuse_from_here)
    monkeypatch.setattr(trt.cuda, "cudaStreamEndCapture", refuse_no_longer)
    backend = open_backend(bundle, trt)
    rows, runs = Subject(backend, bundle.manifest, HALF).start(), trt.runs
    backend.decode(rows[0])
    assert trt.runs == runs + 1
    backend.close()
    trt.cuda.check_all_freed()


# Through the commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_a_conversation_through_the_commands(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first answer is correct, and all are equal to those of ONNX Runtime. ``--verbose`` names the device.

    The engines' context is smaller than the bundle's, and limits the answer.
    """
    monkeypatch.setattr(devices, "_no_nvidia_gpu", lambda: None)
    options = ["--fp16", "--target=tensorrt", f"--kv-cache={cache}"]
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(tmp_path / "b"), *options]) == 0
    asked = [f"--ask={question}" for question in (QUESTION, OTHER_QUESTION)]
    trt = FakeTensorRT(*RTX, FakeCuda())
    bundle = open_bundle(tmp_path / "b")
    assert build(bundle, trt, "--max-context=256") == 0
    capsys.readouterr()
    with installed(trt):
        answers = {}
        for device in ("auto", "cpu"):
            options = [f"--device={device}", "--query-len=4", "--threads=1", "--json", "--verbose"]
            assert cli_run.main([str(bundle.folder), "--image", str(PICTURE), *asked, *options]) == 0
            printed = capsys.readouterr()
            answers[device] = [(one["text"], one["token_ids"]) for one in json.loads(printed.out)["answers"]]
            assert f"running on {'tensorrt-rtx' if device == 'auto' else device}\n" in printed.err
        with load(bundle.folder, lock_memory=True) as fusion:
            assert fusion.device.name == "tensorrt-rtx"
            table = bundle.path(EMBEDDINGS).stat().st_size
            assert locked_bytes() >= table > 0  # the fake maps weights of its graphs, too
        assert locked_bytes() == 0
        question = ["--image", str(PICTURE), *asked, "--threads=1"]
        assert cli_run.main([str(bundle.folder), *question, "--spin"]) == 2
        assert "spin is for ONNX Runtime's threads, and TensorRT has none" in capsys.readouterr().err
    assert answers["auto"] == answers["cpu"]
    assert answers["auto"][0][0] == ANSWER
    assert trt.runs > 0
    trt.cuda.check_all_freed()
