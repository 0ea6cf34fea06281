"""Decode steps that read a window of the KV cache, on a fake TensorRT and on ONNX Runtime."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import JETPACK_6, RTX, FakeTensorRT
from fakes.fake_tensorrt_runtime import IExecutionContext
from fakes.on_fake_tensorrt import build, open_backend, open_on_fake, watch_llm_profiles
from support.backend_contract import HALF, LENGTH, PREFIX, Subject
from support.opset24 import needs_opset_24

from fusion_edge.export.planning import traffic
from fusion_edge.runtime import FusionError
from fusion_edge.runtime.backends.base import Floats
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.backends.tensorrt.backend import TensorRTBackend
from fusion_edge.runtime.backends.tensorrt.graph import EngineGraph
from fusion_edge.runtime.backends.tensorrt.self_test import CHECKED_STEPS
from fusion_edge.runtime.bundle.graphs import LLM
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

pytestmark = needs_opset_24
WINDOWS = [64, 128, 512]


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "b")))


@pytest.fixture
def trt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Engines with three windows."""
    monkeypatch.setattr(traffic, "SMALLEST_WINDOW", WINDOWS[0])
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    return trt


def watched_profiles(backend: TensorRTBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each run of the LLM appends its profile. Decode steps run without CUDA graphs."""
    profiles = watch_llm_profiles(monkeypatch)
    for graph in backend._decode_graphs:
        backend._cuda.destroy_graph(graph)
    backend._decode_graphs = [None] * len(WINDOWS)  # a captured step would not call run
    return profiles


@pytest.mark.parametrize("version", [RTX, JETPACK_6], ids=lambda version: version[1])
def test_the_smallest_window_that_holds_the_sequence(
    bundle: Bundle, version: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps cross two windows; their logits are those of ONNX Runtime, which reads the whole cache."""
    monkeypatch.setattr(traffic, "SMALLEST_WINDOW", 64)
    assert traffic.decode_windows(bundle.manifest.max_context) == WINDOWS
    trt = FakeTensorRT(*version, FakeCuda())
    assert build(bundle, trt, "--parts=2") == 0
    backend = open_backend(bundle, trt)
    profiles = watched_profiles(backend, monkeypatch)
    reference = OnnxRuntimeBackend(bundle, "cpu", 1, False)
    subjects = [Subject(one, bundle.manifest, HALF) for one in (backend, reference)]
    rows, _ = (subject.start(capacity=140) for subject in subjects)
    assert profiles == [0]
    profiles.clear()
    for i in range(140 - LENGTH):
        actual, expected = (subject.backend.decode(rows[i % LENGTH]).copy() for subject in subjects)
        subjects[0].assert_close(actual, expected)
    assert Counter(profiles) == {1: 64 - LENGTH, 2: 64, 3: 12}
    backend.close()
    trt.cuda.check_all_freed()


def test_windows_behind_a_prefix(bundle: Bundle, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the prefix count: steps start in the second window, and cross to the third."""
    backend = open_backend(bundle, trt)
    profiles = watched_profiles(backend, monkeypatch)
    reference = OnnxRuntimeBackend(bundle, "cpu", 1, False)
    subjects = [Subject(one, bundle.manifest, HALF) for one in (backend, reference)]
    for subject in subjects:
        image, prefix = subject.image(), subject.prefix()[1]
        rows, latents, questions = subject.prompt(image, 1)
        subject.backend.prefill(rows, image, latents, questions, 140, prefix)
    assert profiles == [0, 0]
    for row in rows[: 140 - PREFIX - LENGTH]:
        actual, expected = (subject.backend.decode(row).copy() for subject in subjects)
        subjects[0].assert_close(actual, expected)
    assert profiles[2:] == [2] * (128 - PREFIX - LENGTH) + [3] * 12
    backend.close()


@pytest.mark.parametrize("has_prefix", [False, True])
def test_rewinding_to_a_smaller_window(
    bundle: Bundle, trt: FakeTensorRT, has_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence continues in the window that holds what is left of it, as if it had never been longer."""
    backend = open_backend(bundle, trt)
    profiles = watched_profiles(backend, monkeypatch)
    subject = Subject(backend, bundle.manifest, HALF)
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    prefix, before = (subject.prefix()[1], PREFIX) if has_prefix else (None, 0)

    def decode(rows: Floats) -> list[Floats]:
        profiles.clear()
        return [backend.decode(row).copy() for row in rows]

    backend.prefill(rows, image, latents, questions, 140, prefix)
    start = before + LENGTH
    windows = [1 + sum(length >= window for window in WINDOWS) for length in range(start, 140)]
    assert len(set(windows)) == (2 if has_prefix else 3)
    after = np.resize(rows, (140 - start, subject.width))
    expected = decode(after)
    assert profiles == windows
    backend.rewind(start)
    decode(after[::-1])
    for kept in (0, 2):
        backend.rewind(start + kept)
        assert np.array_equal(decode(after[kept:]), expected[kept:])
        assert profiles == windows[kept:]
    backend.close()


@pytest.mark.parametrize("window", WINDOWS)
def test_every_window_is_checked(
    bundle: Bundle, trt: FakeTensorRT, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of one window do not update the cache in place."""
    compute = IExecutionContext._compute

    def forgetful(self: IExecutionContext, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        trt.forgets_caches = self._profile == 1 + WINDOWS.index(window)
        compute(self, addresses, shapes)

    monkeypatch.setattr(IExecutionContext, "_compute", forgetful)
    with pytest.raises(FusionError, match=rf"^Decode and prefill of tensorrt_rtx .* disagree for {window} slots of"):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()


def test_the_check_fits_the_smallest_window(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompt has fewer latents than a question if these would leave no room for steps."""
    monkeypatch.setattr(traffic, "SMALLEST_WINDOW", 24)
    assert traffic.decode_windows(bundle.manifest.max_context) == [24, 48, 96, 512]
    assert bundle.manifest.query_lengths[0] + CHECKED_STEPS >= 24
    fake = open_on_fake(bundle, *RTX)
    fake.backend.close()
    fake.cuda.check_all_freed()


def test_one_warning_for_all_windows(bundle: Bundle, trt: FakeTensorRT, capsys: pytest.CaptureFixture[str]) -> None:
    trt.refuses_capture = True
    capsys.readouterr()
    backend = open_backend(bundle, trt)
    assert backend._decode_graphs == [None] * len(WINDOWS)
    reason = "tensorrt_rtx failed to run llm: This cannot be captured."
    assert capsys.readouterr().err == f"warning: decode steps run without a CUDA graph: {reason}\n"
    backend.close()
    trt.cuda.check_all_freed()


@pytest.mark.parametrize("is_capturing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, FusionError])
def test_graphs_are_freed_if_the_second_window_fails(
    bundle: Bundle,
    trt: FakeTensorRT,
    is_capturing: bool,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refusal to capture is no failure, an interrupt is."""
    run = EngineGraph.run
    failed = []

    def failing(self: EngineGraph, profile: int, stream: int, *rest: object) -> None:
        run(self, profile, stream, *rest)  # type: ignore[arg-type]
        if profile == 2 and trt.cuda.is_capturing(stream) == is_capturing:
            failed.append(len(trt.cuda.graphs))
            raise error("stop")

    with monkeypatch.context() as patch:
        patch.setattr(EngineGraph, "run", failing)
        if error is FusionError and is_capturing:
            backend = open_backend(bundle, trt)
            assert [graph is None for graph in backend._decode_graphs] == [False, True, False]
            backend.close()
        else:
            with pytest.raises(error, match="stop"):
                open_backend(bundle, trt)
    assert failed == [1]
    trt.cuda.check_all_freed()


def test_slots_beyond_the_sequence_change_nothing(bundle: Bundle) -> None:
    """Attention gives them the weight 0."""
    spec = bundle.manifest.graphs[LLM]
    capacity, language = 96, bundle.manifest.model.language
    generator = np.random.default_rng(0)
    feed = {}
    sizes = {"positions": 5, "questions": 0, "latents": 0, "capacity": capacity}
    for tensor in spec["inputs"]:
        if tensor["name"] != "slots":
            shape = [sizes[size] if isinstance(size, str) else size for size in tensor["shape"]]
            feed[tensor["name"]] = generator.normal(0, 1, shape).astype(tensor["dtype"])
    feed["positions"], feed["write_index"] = np.arange(20, 25)[None], np.array([20])
    model = onnx.load(bundle.path("llm.onnx"))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results = [session.run(["logits"], feed | {"slots": np.arange(size)})[0] for size in (25, 32, 64, capacity)]
    assert results[0].shape == (1, language.vocab_size)
    for result in results[1:]:
        assert np.abs(result - results[0]).max() <= HALF * results[0].std()
    shorter = session.run(["logits"], feed | {"slots": np.arange(20)})[0]
    assert np.abs(shorter - results[0]).max() > HALF * results[0].std()
