"""The int8 KV cache of TensorRT, which the backend writes, on fakes of TensorRT and CUDA."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.on_fake_tensorrt import OnFake, build, open_backend, open_on_fake, watch_llm_profiles
from support import compared_engines
from support.backend_contract import HALF, LENGTH, PREFIX, Subject
from support.opset24 import needs_opset_24

from fusion_edge.export import cli
from fusion_edge.export.engines import engine_check, optimization_profiles
from fusion_edge.export.planning import traffic
from fusion_edge.runtime import FusionError
from fusion_edge.runtime.backends.base import Floats, KvPrefix
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.backends.tensorrt import kv_cache
from fusion_edge.runtime.backends.tensorrt.kv_cache import Part, QuantizedKvCache
from fusion_edge.runtime.backends.tensorrt.memory import DeviceTensor
from fusion_edge.runtime.backends.tensorrt.memory_estimate import (
    check_device_memory,
    prompt_cache_bytes,
    tensor_bytes,
)
from fusion_edge.runtime.backends.tensorrt.self_test import PREFIX_TOKENS
from fusion_edge.runtime.bundle.engines import all_engines
from fusion_edge.runtime.bundle.graphs import LLM, cache_slots, token_alignment
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

pytestmark = needs_opset_24  # the fake of TensorRT computes with it
STEP = ["cudaGraphLaunch", "cudaMemcpy2DAsync", "cudaMemcpy2DAsync", "cudaStreamSynchronize"]
WINDOWS = [64, 128, 256, 576]
Codes = npt.NDArray[Any]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    options = ["--fp16", "--target=tensorrt", "--kv-cache=int8"]
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), *options]) == 0
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(exported, tmp_path / "b")))


@pytest.fixture
def fake(bundle: Bundle) -> OnFake:
    return open_on_fake(bundle, *RTX, "--parts=2")


def cache_of(fake: OnFake) -> QuantizedKvCache:
    cache = fake.backend._cache
    assert isinstance(cache, QuantizedKvCache)
    return cache


def rows_of(fake: OnFake, part: Part) -> Codes:
    """Return the memory of codes or scales, ``[slices,slots,width]``, writable."""
    size = len(part.names) * part.slice_bytes
    return fake.cuda.view(part.memory.pointer, size).view(part.memory.dtype).reshape(part.memory.shape[1:])


def prompt(subject: Subject, prefix: KvPrefix | None = None, capacity: int = 300) -> Floats:
    """Run a prompt, and return its rows."""
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    subject.backend.prefill(rows, image, latents, questions, capacity, prefix)
    return rows


def test_a_step_is_one_launch_and_two_copies(bundle: Bundle, fake: OnFake) -> None:
    """One of codes and one of scales, of all layers."""
    rows = prompt(Subject(fake.backend, bundle.manifest, HALF))
    for row in rows[:3]:
        fake.cuda.calls.clear()
        fake.backend.decode(row)
        assert fake.cuda.calls == STEP
    fake.backend.close()
    fake.cuda.check_all_freed()


@pytest.mark.parametrize("has_prefix", [False, True])
def test_rows_land_in_their_slots(bundle: Bundle, fake: OnFake, has_prefix: bool) -> None:
    """Rows of steps are those that a prompt writes; all others stay as they were. Behind a prefix slots stay unused."""
    subject, parts = Subject(fake.backend, bundle.manifest, HALF), cache_of(fake)._parts
    prefix = subject.prefix()[1] if has_prefix else None
    step = token_alignment(bundle.manifest.cache_specs)
    before = PREFIX if has_prefix else 0
    first = -(-before // step) * step
    assert first == (step if has_prefix else 0)
    assert first != before or not has_prefix
    for part in parts:
        rows_of(fake, part)[:, before:] = 77
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    steps = LENGTH - int(questions[0]) - 1
    fake.backend.prefill(rows, image, latents, questions, 300, prefix)
    expected = [rows_of(fake, part).copy() for part in parts]
    for part in parts:
        rows_of(fake, part)[:, first + LENGTH - steps :] = 77
    fake.backend.prefill(rows[:-steps], image, latents, questions, 300, prefix)
    for row in rows[-steps:]:
        fake.backend.decode(row)
    for part, written in zip(parts, expected, strict=True):
        actual = rows_of(fake, part)
        used = slice(first, first + LENGTH)
        assert np.array_equal(actual[:, :before], written[:, :before])
        for array in (actual, written):
            assert (array[:, before:first] == 77).all()
            assert (array[:, first + LENGTH :] == 77).all()
        difference = np.abs(actual[:, used].astype(np.float64) - written[:, used])
        assert difference.max() <= (1 if part.memory.dtype == np.int8 else 0.01 * np.abs(written[:, used]).max())
        assert part.memory.dtype == np.float16 or (difference > 0).mean() < 0.05
    fake.backend.close()


@pytest.mark.parametrize("has_prefix", [False, True])
def test_unused_slots_change_nothing(bundle: Bundle, fake: OnFake, has_prefix: bool) -> None:
    """Logits are the same, bit for bit, whatever lies in slots that no token of the sequence has."""
    subject, generator = Subject(fake.backend, bundle.manifest, HALF), np.random.default_rng(0)
    prefix = subject.prefix()[1] if has_prefix else None
    before = PREFIX if has_prefix else 0
    step = token_alignment(bundle.manifest.cache_specs)
    first = -(-before // step) * step

    def steps(fills: bool) -> list[Floats]:
        rows, found = prompt(subject, prefix), []
        for number, row in enumerate(rows[:8]):
            for part in cache_of(fake)._parts if fills else ():
                memory = rows_of(fake, part)
                for unused in (memory[:, before:first], memory[:, first + LENGTH + number :]):
                    unused[...] = generator.integers(-127, 128, unused.shape) * (1 if unused.dtype == np.int8 else 300)
            found.append(fake.backend.decode(row).copy())
        return found

    for actual, expected in zip(steps(fills=True), steps(fills=False), strict=True):
        assert np.array_equal(actual, expected)
    fake.backend.close()


@pytest.mark.parametrize("has_prefix", [False, True])
def test_steps_cross_windows(bundle: Bundle, has_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step reads the smallest window that holds the tokens before it, and gives the logits of ONNX Runtime."""
    monkeypatch.setattr(traffic, "SMALLEST_WINDOW", WINDOWS[0])
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    backend = open_backend(bundle, trt)
    assert backend._windows == WINDOWS
    launched: list[int] = []
    launch = trt.cuda.cudaGraphLaunch

    def watched(graph: Any, stream: int) -> Any:
        launched.append(next(i for i, one in enumerate(backend._decode_graphs) if one is graph))
        return launch(graph, stream)

    monkeypatch.setattr(trt.cuda, "cudaGraphLaunch", watched)
    reference = OnnxRuntimeBackend(bundle, "cpu", 1, False)
    subjects = [Subject(one, bundle.manifest, HALF) for one in (backend, reference)]
    rows, _ = (prompt(subject, subject.prefix()[1] if has_prefix else None) for subject in subjects)
    for i in range(80):
        actual, expected = (subject.backend.decode(rows[i % LENGTH]).copy() for subject in subjects)
        subjects[0].assert_close(actual, expected)
    step = token_alignment(bundle.manifest.cache_specs)
    start = LENGTH + (-(-PREFIX // step) * step if has_prefix else 0)
    assert Counter(launched) == Counter(
        next(i for i, window in enumerate(WINDOWS) if window >= start + number) for number in range(80)
    )
    backend.rewind(LENGTH + (PREFIX if has_prefix else 0))
    reference.rewind(LENGTH + (PREFIX if has_prefix else 0))
    actual, expected = (subject.backend.decode(rows[0]).copy() for subject in subjects)
    subjects[0].assert_close(actual, expected)
    backend.close()
    trt.cuda.check_all_freed()


def test_the_whole_context_behind_a_prefix(bundle: Bundle, fake: OnFake) -> None:
    """The unused slots take no token's place."""
    subject = Subject(fake.backend, bundle.manifest, HALF)
    reference = Subject(OnnxRuntimeBackend(bundle, "cpu", 1, False), bundle.manifest, HALF)
    most, results = bundle.manifest.max_context, []
    for one in (subject, reference):
        image, prefix = one.image(), one.prefix()[1]
        short, latents, questions = one.prompt(image, 1)
        rows = np.resize(short, (most - PREFIX - 1, one.width)).astype(np.float32)
        one.backend.prefill(rows, image, latents, questions, most, prefix)
        results.append(one.backend.decode(short[0]).copy())
        with pytest.raises(FusionError, match="more than its capacity"):
            one.backend.decode(short[0])
    subject.assert_close(*results)
    fake.backend.close()


def test_a_prefix_is_copied_only_when_it_is_elsewhere(bundle: Bundle, fake: OnFake) -> None:
    """With one copy of codes and one of scales. A prefix of another length moves the unused slots."""
    subject = Subject(fake.backend, bundle.manifest, HALF)
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    first, second = subject.prefix()[1], fake.backend.prefill_prefix(subject.prefix(8)[0][:50])

    def copies(prefix: KvPrefix | None) -> tuple[int, Floats]:
        fake.cuda.calls.clear()
        logits = fake.backend.prefill(rows, image, latents, questions, 300, prefix).copy()
        count = fake.cuda.calls.count("cudaMemcpy2DAsync")
        return count, np.stack([logits, *(fake.backend.decode(row).copy() for row in rows[:3])])

    order = (second, second, first, first, None, None, first, second)
    found = [copies(prefix) for prefix in order]
    assert [count for count, _ in found] == [0, 0, 2, 0, 0, 0, 2, 2]
    for one, other in ((0, 1), (0, 7), (2, 3), (2, 6), (4, 5)):
        assert np.array_equal(found[one][1], found[other][1])
    assert not np.array_equal(found[0][1], found[2][1])
    fake.backend.close()
    fake.cuda.check_all_freed()


@pytest.mark.parametrize("window", range(2))
def test_rows_that_are_not_stored_are_detected(bundle: Bundle, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any window, at load."""
    monkeypatch.setattr(traffic, "SMALLEST_WINDOW", 256)
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    profiles, store = watch_llm_profiles(monkeypatch), QuantizedKvCache.store

    def forgetful(self: QuantizedKvCache, length: int, stream: int) -> None:
        if profiles[-1] != 1 + window:
            store(self, length, stream)

    monkeypatch.setattr(QuantizedKvCache, "store", forgetful)
    trt.refuses_capture = True  # a captured step would not be watched
    size = (256, 576)[window]
    with pytest.raises(FusionError, match=rf"^Decode and prefill of tensorrt_rtx .* disagree for {size} slots of"):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()


@pytest.mark.parametrize("seen", [3, 59])
def test_a_forgotten_mark_is_detected(bundle: Bundle, seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At load: slots that hold no token of the sequence must have no position in reach. 3B has three, here are 59."""
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    start, step = QuantizedKvCache.start, token_alignment(bundle.manifest.cache_specs)
    assert step - PREFIX_TOKENS == 59

    def careless(self: QuantizedKvCache, length: int, slots: DeviceTensor, stream: int) -> dict[str, int]:
        addresses = start(self, length, slots, stream)
        if length:
            places = np.arange(slots.shape[0])
            places[length:step] = kv_cache.UNUSED
            places[length : length + seen] = 0
            places[step:] -= step - length
            slots.upload(places, stream)
        return addresses

    monkeypatch.setattr(QuantizedKvCache, "start", careless)
    with pytest.raises(FusionError, match=r"^Decode and prefill of tensorrt_rtx .* disagree behind a prefix, so"):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()


def test_slots_that_hold_no_token_are_hidden(bundle: Bundle, fake: OnFake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their mark, logits behind a prefix differ."""
    subject = Subject(fake.backend, bundle.manifest, HALF)
    prefix = subject.prefix()[1]
    rows = prompt(subject, prefix)
    expected = fake.backend.decode(rows[0]).copy()
    monkeypatch.setattr(kv_cache, "UNUSED", 0)
    prompt(subject)  # the next prompt places its tokens anew
    rows = prompt(subject, prefix)
    assert not np.array_equal(fake.backend.decode(rows[0]), expected)
    fake.backend.close()


def test_memory(bundle: Bundle, fake: OnFake) -> None:
    """The cache is allocated once, with half of the bytes of float16 and its scales; the estimate counts it so."""
    specs, context = bundle.manifest.cache_specs, bundle.manifest.max_context
    language = bundle.manifest.model.language
    assert bundle.manifest.cache_token_bytes == language.cache_values + 4 * language.layers * language.kv_heads
    slots = cache_slots(specs, context)
    allocated = sum(len(part.names) * part.slice_bytes for part in cache_of(fake)._parts)
    assert allocated == slots * bundle.manifest.cache_token_bytes
    ((engines, _),) = all_engines(bundle)

    def cached(*starts: str) -> int:
        """Return the estimate for the tensors whose names start so."""
        return tensor_bytes(
            dataclasses.replace(
                engine,
                inputs=tuple(one for one in engine.inputs if one["name"].startswith(starts)),
                outputs=tuple(one for one in engine.outputs if one["name"].startswith(starts)),
            )
            for engine in engines.engines[LLM]
        )

    assert cached("slots.", "prefix.", "new.") == cached("slots.") == allocated
    fake.backend.close()


def test_too_little_memory_names_no_int8_cache(bundle: Bundle, fake: OnFake) -> None:
    """The bundle has one."""
    fake.backend.close()
    ((engines, _),) = all_engines(bundle)
    with pytest.raises(FusionError, match="or export with --int4, fewer --image-tokens or a smaller"):
        check_device_memory(bundle.manifest, engines, Cuda(FakeCuda(free=1_000_000)))


def test_memory_of_a_prompt(bundle: Bundle) -> None:
    """Keys and values of a layer in float16, of the longest prefix and of the longest prompt behind it."""
    manifest = bundle.manifest
    language = manifest.model.language
    row = 2 * 2 * language.kv_heads * language.head_dim
    assert [prompt_cache_bytes(manifest, context) for context in (576, 90)] == [row * (96 + 576), row * (89 + 90)]
    assert prompt_cache_bytes(dataclasses.replace(manifest, cache="float16"), 576) == 0


def test_comparison_with_the_cpu(bundle: Bundle) -> None:
    """Limits of the LLM allow for codes that rounding moves."""
    trt = compared_engines.fake()
    assert compared_engines.build(trt, bundle.folder) == 0
    check = compared_engines.engines_of(bundle.folder).check
    assert [stage.stage for stage in check.stages] == compared_engines.STAGES
    assert all(stage.relative_error <= stage.limit / 2 for stage in check.stages)
    config = bundle.manifest.model
    layers = config.language.layers
    rounded = engine_check.CACHE_ROUNDINGS * layers * engine_check.INT8_FLIP**2
    squared = {stage.stage: (stage.limit / engine_check.GROWTH) ** 2 for stage in check.stages}
    others = (1 + config.alignment.layers + layers) * engine_check.ROUNDINGS * engine_check.HALF_ROUNDING**2
    assert squared["prefill"] == pytest.approx(others + rounded)


def test_profiles(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts read no slots, and steps no prefix. Short prompts are those behind a scene's tokens.

    A prefix has up to 80 tokens of text and 16 of an image, and leaves room for a token.
    """
    monkeypatch.setattr(optimization_profiles, "SHORT_PROMPT", (40, 70))
    monkeypatch.setattr(traffic, "SMALLEST_WINDOW", 256)
    manifest = bundle.manifest
    limits = optimization_profiles.engine_limits(manifest, manifest.max_context)
    short, whole, *steps = optimization_profiles.optimization_profiles(manifest, limits)[LLM]
    most = manifest.max_context
    assert (short["positions"], short["slots"], short["prefix"]) == ((40, 64, 70), (0, 0, 0), (0, 16, 96))
    assert (whole["positions"], whole["slots"], whole["prefix"]) == ((1, 80, most), (0, 0, 0), (0, 0, 96))
    _, small, *_ = optimization_profiles.optimization_profiles(
        manifest, optimization_profiles.engine_limits(manifest, 90)
    )[LLM]
    assert (small["positions"][2], small["prefix"][2]) == (90, 89)
    slots = cache_slots(manifest.cache_specs, most)
    assert [step["slots"] for step in steps] == [(256,) * 3, (slots,) * 3]
    assert all(step["prefix"] == (0, 0, 0) and step["positions"] == (1, 1, 1) for step in steps)
