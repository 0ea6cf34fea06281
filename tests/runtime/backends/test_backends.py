"""The contract of every backend. Backends without their device are skipped, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes.fake_backend import FakeBackend
from fakes.fake_tensorrt import FULL, JETPACK_6, RTX
from fakes.on_fake_tensorrt import open_on_fake
from support.backend_contract import HALF, BackendContract, Subject
from support.checkpoints import TINY, write_checkpoint
from support.cpu_kernel_switches import exact_attention
from support.opset24 import needs_opset_24

from fusion_edge.export import cli
from fusion_edge.export.engines import cli as cli_build
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.runtime.backends.devices import CANDIDATES
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

EXACT, INT8_CACHE = 1e-4, 0.1
"""Tolerances of float32 and of int8 caches, which decode reads and prefill does not."""

TENSORRT_INT8_CACHE = "--target tensorrt --kv-cache int8"
TENSORRT_INT4 = "--int4 --group-size 64 --target tensorrt"

WIDE = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, hidden_size=64, heads=4, kv_heads=4))
"""Inputs in whole blocks of 64."""

Export = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """``exported("--fp32 --target cpu")`` returns the bundle of these options, exported once."""
    bundles: dict[str, Bundle] = {}
    wide = write_checkpoint(tmp_path_factory.mktemp("wide") / "FUSION-wide", WIDE)

    def export(options: str) -> Bundle:
        if options not in bundles:
            folder = tmp_path_factory.mktemp("bundle") / "tiny"
            checkpoint = wide if options == TENSORRT_INT4 else tiny_checkpoint
            assert cli.main([str(checkpoint), "-o", str(folder), *options.split()]) == 0
            bundles[options] = open_bundle(folder)
        return bundles[options]

    return export


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """Compute the attention of prefill in float32, as that of decode steps: results are equal."""
    with exact_attention():
        yield


def on_device(name: str, options: str, tolerance: float) -> Callable[[Export], Subject]:
    """Open a device of ``runtime/backends/devices.py`` on the bundle of ``options``."""

    def make(exported: Export) -> Subject:
        (candidate,) = (candidate for candidate in CANDIDATES if candidate.name == name)
        bundle = exported(options)
        if reason := candidate.reason(bundle):
            pytest.skip(f"{name}: {reason}")
        return Subject(candidate.open(bundle, 1, False), bundle.manifest, tolerance)

    return make


def built(name: str, options: str) -> Callable[[Export], Subject]:
    """Open a TensorRT device on engines that ``fusion-build`` has built."""

    def make(exported: Export) -> Subject:
        (candidate,) = (candidate for candidate in CANDIDATES if candidate.name == name)
        if candidate.reason(exported(options)) is None:
            assert cli_build.main([str(exported(options).folder), "--library", name]) == 0
        return on_device(name, options, HALF)(exported)

    return make


def on_fake(version: tuple[str, str], options: str, *build: str) -> Callable[[Export], Subject]:
    """Open the TensorRT backend on fakes of TensorRT and CUDA."""

    def make(exported: Export) -> Subject:
        bundle = exported(options)
        return Subject(open_on_fake(bundle, *version, *build).backend, bundle.manifest, HALF)

    return make


def eager(exported: Export) -> Subject:
    bundle = exported("--int4")
    return Subject(EagerBackend(bundle.manifest.model, BundleWeights(bundle)), bundle.manifest, EXACT)


def fake(exported: Export) -> Subject:
    manifest = exported("--int4").manifest
    return Subject(FakeBackend(manifest.model), manifest, EXACT)


SUBJECTS = {
    "onnxruntime": on_device("cpu", "--int4", EXACT),
    "onnxruntime-float": on_device("cpu", "--fp32", EXACT),
    "onnxruntime-int8-cache": on_device("cpu", "--fp32 --kv-cache int8", INT8_CACHE),
    "onnxruntime-int4-int8-cache": on_device("cpu", "--int4 --kv-cache int8", INT8_CACHE),
    "onnxruntime-half": on_device("cpu", "--fp16 --target cuda", HALF),
    "onnxruntime-tensorrt": on_device("cpu", "--fp16 --target tensorrt", HALF),
    "onnxruntime-tensorrt-int4": on_device("cpu", TENSORRT_INT4, HALF),
    "onnxruntime-tensorrt-int8-cache": on_device("cpu", f"--fp16 {TENSORRT_INT8_CACHE}", HALF),
    "tensorrt-fake": on_fake(RTX, "--fp16 --target tensorrt", "--parts=1"),
    "tensorrt-fake-plugins": on_fake(FULL, "--fp16 --target tensorrt", "--parts=1"),
    "tensorrt-fake-jetpack-6": on_fake(JETPACK_6, "--fp16 --target tensorrt"),
    "tensorrt-fake-int4-parts": on_fake(RTX, TENSORRT_INT4, "--parts=3"),
    "tensorrt-fake-int8-cache": on_fake(RTX, f"--fp16 {TENSORRT_INT8_CACHE}", "--parts=3"),
    "tensorrt-fake-jetpack-6-int8-cache": on_fake(JETPACK_6, f"--fp16 {TENSORRT_INT8_CACHE}"),
    "eager": eager,
    "fake": fake,
    "cuda": on_device("cuda", "--int4 --target cuda", HALF),
    "tensorrt": built("tensorrt", TENSORRT_INT4),
    "tensorrt-rtx": built("tensorrt-rtx", TENSORRT_INT4),
}


def needs(name: str) -> list[pytest.MarkDecorator]:
    """Return the skip marks of a backend that runs TensorRT graphs on ONNX Runtime."""
    return [needs_opset_24] if name.startswith(("onnxruntime-tensorrt", "tensorrt-fake")) else []


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs(name)) for name in SUBJECTS])
def subject(request: pytest.FixtureRequest, exported: Export) -> Iterator[Subject]:
    subject = SUBJECTS[request.param](exported)
    yield subject
    subject.backend.close()


class TestBackends(BackendContract):
    """The tests of ``backend_contract.py``."""


def test_every_device_is_tested() -> None:
    assert {candidate.name for candidate in CANDIDATES} <= {"cpu", *SUBJECTS}
