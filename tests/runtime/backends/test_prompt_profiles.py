"""Short prompts, as those behind a scene, have a profile of their own, on a fake TensorRT."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.fake_tensorrt_runtime import IExecutionContext
from fakes.on_fake_tensorrt import build, open_backend, watch_llm_profiles
from support.backend_contract import HALF, Subject
from support.opset24 import needs_opset_24

from fusion_edge.export.engines import optimization_profiles
from fusion_edge.export.engines.optimization_profiles import EngineLimits, engine_limits
from fusion_edge.runtime import FusionError
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.bundle.graphs import LLM
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

SHORT = 40, 70
"""Holds the tiny bundle's typical question, 64 tokens, and not its typical prompt, 80."""


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "b")))


@pytest.fixture
def trt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Engines with a profile for short prompts."""
    monkeypatch.setattr(optimization_profiles, "SHORT_PROMPT", SHORT)
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt, "--parts=2") == 0
    return trt


@needs_opset_24
def test_the_profile_that_holds_the_prompt(bundle: Bundle, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a prefix do not count. Results are those of ONNX Runtime, also of steps that follow."""
    backend = open_backend(bundle, trt)
    profiles = watch_llm_profiles(monkeypatch)
    reference = OnnxRuntimeBackend(bundle, "cpu", 1, False)
    subjects = [Subject(one, bundle.manifest, HALF) for one in (backend, reference)]
    generator = np.random.default_rng(0)
    images = [subject.image() for subject in subjects]
    prefixes = [subject.prefix()[1] for subject in subjects]
    count = len(images[0].latents)
    for length, profile in [(30, 1), (39, 1), (40, 0), (64, 0), (70, 0), (71, 1), (80, 1)]:
        rows = generator.normal(0, 0.5, (length, subjects[0].width)).astype(np.float32)
        places, last = np.arange(4, 4 + count)[None], np.array([length - 1])
        for has_prefix in (False, True):
            profiles.clear()
            results = []
            for subject, image, prefix in zip(subjects, images, prefixes, strict=True):
                given = rows.copy()
                given[places] = image.latents
                at = prefix if has_prefix else None
                logits = subject.backend.prefill(given, image, places, last, 200, at).copy()
                results.append((logits, subject.backend.decode(rows[0]).copy()))
            assert profiles == [profile]
            for actual, expected in zip(*results, strict=True):
                subjects[0].assert_close(actual, expected)
    backend.close()
    trt.cuda.check_all_freed()


@needs_opset_24
@pytest.mark.parametrize("profile", [0, 1])
def test_every_profile_is_checked(
    bundle: Bundle, trt: FakeTensorRT, profile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one profile do not update the cache."""
    compute = IExecutionContext._compute

    def forgetful(self: IExecutionContext, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        trt.forgets_caches = self._profile == profile
        compute(self, addresses, shapes)

    monkeypatch.setattr(IExecutionContext, "_compute", forgetful)
    with pytest.raises(FusionError, match=r"^Decode and prefill of tensorrt_rtx .* disagree for 512 slots of"):
        open_backend(bundle, trt)
    trt.cuda.check_all_freed()


@needs_opset_24
def test_a_prompt_that_no_profile_holds(bundle: Bundle, trt: FakeTensorRT) -> None:
    """The error has the range of the profile for all prompts."""
    backend = open_backend(bundle, trt)
    subject = Subject(backend, bundle.manifest, HALF)
    rows, places, last = subject.prompt(subject.image(), 1)
    with pytest.raises(FusionError, match="has 0 tokens of the prompt, and the engines support 1 to 512"):
        backend.prefill(rows[:0], subject.image(), places, last, 64)
    backend.close()


def profiles_of(bundle: Bundle, short: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    monkeypatch.setattr(optimization_profiles, "SHORT_PROMPT", short)
    limits: EngineLimits = engine_limits(bundle.manifest, bundle.manifest.max_context)
    ranges = optimization_profiles.optimization_profiles(bundle.manifest, limits)[LLM]
    assert all(profile["questions"] == (0, 1, limits.max_questions) for profile in ranges[:-1])
    return [profile["positions"] for profile in ranges]


def test_when_there_is_a_profile_for_short_prompts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a typical question fits it, and a typical prompt does not."""
    whole, steps = (1, 80, 512), (1, 1, 1)
    assert profiles_of(bundle, (40, 79), monkeypatch) == [(40, 64, 79), whole, steps]
    assert profiles_of(bundle, (64, 64), monkeypatch) == [(64, 64, 64), whole, steps]
    for short in ((40, 80), (40, 63), (65, 79)):
        assert profiles_of(bundle, short, monkeypatch) == [whole, steps]
