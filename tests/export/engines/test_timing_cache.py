"""The timing cache of ``fusion-build`` outlives a build that fails or is interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, Builder, FakeTensorRT, IBuilderConfig, INetworkDefinition
from fakes.on_fake_tensorrt import build

from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

PARTS = "--parts=2"
"""Four engines: two of the LLM."""
FIRST = b"vision_encoder alignment_decoder "
"""The fake's cache after two engines."""


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny")))


def cache_of(bundle: Bundle) -> Path:
    return bundle.folder / ENGINES_FOLDER / "tensorrt-10.16.0-cc8.6.timing"


def files(bundle: Bundle) -> dict[Path, bytes]:
    """Return the content of all files but the timing cache."""
    return {path: path.read_bytes() for path in bundle.folder.rglob("*") if path.is_file() and path != cache_of(bundle)}


@pytest.fixture
def given_caches(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The caches that engines are built with."""
    caches: list[bytes] = []
    create = IBuilderConfig.create_timing_cache

    def watched(self: IBuilderConfig, serialized_timing_cache: bytes) -> object:
        caches.append(serialized_timing_cache)
        return create(self, serialized_timing_cache)

    monkeypatch.setattr(IBuilderConfig, "create_timing_cache", watched)
    return caches


def in_third_engine(monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRT, act: Callable[[], object]) -> None:
    """Call ``act`` as the third engine is built."""
    whole = Builder.build_serialized_network

    def build_serialized_network(self: Builder, network: INetworkDefinition, config: IBuilderConfig) -> object:
        if len(trt.built) == 2:
            act()
        return whole(self, network, config)

    monkeypatch.setattr(Builder, "build_serialized_network", build_serialized_network)


def failing(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    trt = FakeTensorRT(*FULL, FakeCuda())
    in_third_engine(monkeypatch, trt, lambda: setattr(trt, "build_error", "Out of memory."))
    return trt


def interrupted(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    trt = FakeTensorRT(*FULL, FakeCuda())

    def interrupt() -> None:
        if len(trt.built) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # until the main thread has handled it

    trt.on_step = interrupt
    return trt


@pytest.mark.parametrize(("make", "code"), [(failing, 1), (interrupted, 130)])
def test_a_later_build_gets_the_times_of_engines_that_were_built(
    bundle: Bundle,
    make: Callable[[pytest.MonkeyPatch], FakeTensorRT],
    code: int,
    given_caches: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third of four fails. The bundle is the same but for the cache."""
    before = files(bundle)
    with monkeypatch.context() as patch:
        trt = make(patch)
        assert build(bundle, trt, PARTS) == code
    assert len(trt.built) == 2
    assert cache_of(bundle).read_bytes() == FIRST
    assert files(bundle) == before
    given_caches.clear()
    assert build(bundle, FakeTensorRT(*FULL, FakeCuda()), PARTS) == 0
    assert given_caches[0] == FIRST
    assert cache_of(bundle).read_bytes().startswith(FIRST + FIRST + b"llm")


def test_engines_of_an_earlier_build_stay(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(bundle, FakeTensorRT(*FULL, FakeCuda()), PARTS) == 0
    before, times = files(bundle), cache_of(bundle).read_bytes()
    assert build(bundle, failing(monkeypatch), PARTS, "--force") == 1
    assert files(bundle) == before
    assert cache_of(bundle).read_bytes() == times + FIRST


def test_a_build_that_fails_at_once_keeps_the_cache(bundle: Bundle) -> None:
    assert build(bundle, FakeTensorRT(*FULL, FakeCuda()), PARTS) == 0
    trt, times = FakeTensorRT(*FULL, FakeCuda()), cache_of(bundle).read_bytes()
    trt.build_error = "Out of memory."
    assert build(bundle, trt, PARTS, "--force") == 1
    assert cache_of(bundle).read_bytes() == times


def test_a_failed_write_keeps_the_cache_whole(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk becomes full as the cache is renamed."""
    assert build(bundle, FakeTensorRT(*FULL, FakeCuda()), PARTS) == 0
    times = cache_of(bundle).read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("fusion_edge.runtime.system.output_file.os.replace", fail)
    assert build(bundle, FakeTensorRT(*FULL, FakeCuda()), PARTS, "--force") == 1
    assert " is full; free some space and build again." in capsys.readouterr().err
    assert cache_of(bundle).read_bytes() == times
    assert not list(cache_of(bundle).parent.glob(".*timing*"))
