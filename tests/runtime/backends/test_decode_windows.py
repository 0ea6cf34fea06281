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
from fakes.on_fake_tensorrt import build, open_backend
from support.backend_contract import LENGTH, Subject
from support.opset24 import needs_opset_24

from fusion_edge.export.planning import traffic
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.backends.tensorrt.graph import EngineGraph
from fusion_edge.runtime.bundle.graphs import LLM
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

pytestmark = needs_opset_24
HALF = 0.02
"""Tolerance of float16, in standard deviations, as in ``test_backends.py``."""


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "b")))


@pytest.mark.parametrize("version", [RTX, JETPACK_6], ids=lambda version: version[1])
def test_the_smallest_window_that_holds_the_sequence(
    bundle: Bundle, version: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps cross two windows; their logits are those of ONNX Runtime, which reads the whole cache."""
    monkeypatch.setattr(traffic, "SMALLEST_WINDOW", 64)
    assert traffic.decode_windows(bundle.manifest.max_context) == [64, 128, 512]
    trt = FakeTensorRT(*version, FakeCuda())
    assert build(bundle, trt, "--parts=2") == 0
    profiles: list[int] = []
    run = EngineGraph.run

    def watched(self: EngineGraph, profile: int, *rest: object) -> None:
        profiles.append(profile) if self.name == LLM else None
        run(self, profile, *rest)  # type: ignore[arg-type]

    backend = open_backend(bundle, trt)
    backend._decode_graphs = [None] * 3  # a captured step would not call run
    monkeypatch.setattr(EngineGraph, "run", watched)
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
