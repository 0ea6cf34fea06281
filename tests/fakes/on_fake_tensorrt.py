"""Run the TensorRT backend and ``fusion-build`` on ``fake_tensorrt.py`` and ``fake_cuda.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FakeTensorRT

from fusion_edge.export.engines import cli as cli_build
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.backend import TensorRTBackend
from fusion_edge.runtime.backends.tensorrt.graph import EngineGraph
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.bundle.graphs import LLM
from fusion_edge.runtime.bundle.reader import Bundle


@dataclass
class OnFake:
    """A backend on its fakes."""

    backend: TensorRTBackend
    trt: FakeTensorRT
    cuda: FakeCuda


@contextmanager
def installed(trt: FakeTensorRT) -> Iterator[None]:
    """Make the fake modules importable, and no other TensorRT or CUDA."""
    modules = {"cuda.bindings.runtime": trt.cuda, "tensorrt.plugin": trt.plugin, trt.__name__: trt}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tensorrt", "tensorrt_rtx", *modules):
            patch.setitem(sys.modules, name, modules.get(name))  # None: it cannot be imported
        yield


def build(bundle: Bundle, trt: FakeTensorRT, *options: str) -> int:
    """Run ``fusion-build`` with a fake TensorRT and without a comparison, and return the exit code."""
    library = trt.__name__.replace("_", "-")
    with installed(trt):
        return cli_build.main([str(bundle.folder), "--library", library, "--skip-comparison", *options])


def open_backend(bundle: Bundle, trt: FakeTensorRT) -> TensorRTBackend:
    """Open the backend on built engines."""
    return TensorRTBackend(bundle, Library(trt), Cuda(trt.cuda))


def open_on_fake(bundle: Bundle, name: str, version: str, *options: str) -> OnFake:
    """Build engines with the options of ``fusion-build``, and open the backend on them."""
    trt = FakeTensorRT(name, version, FakeCuda())
    assert build(bundle, trt, *options) == 0
    return OnFake(open_backend(bundle, trt), trt, trt.cuda)


def watch_llm_profiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each run of the LLM, outside a CUDA graph, appends its profile."""
    profiles: list[int] = []
    run = EngineGraph.run

    def watched(self: EngineGraph, profile: int, *rest: object) -> None:
        profiles.append(profile) if self.name == LLM else None
        run(self, profile, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EngineGraph, "run", watched)
    return profiles
