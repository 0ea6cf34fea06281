"""TensorRT's own Python module, where it can be imported: .ci/bindings runs these tests with several versions."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from bindings import expressions

from fusion_edge.kernels.tensorrt_plugins import MINIMUM_VERSION
from fusion_edge.runtime.backends.tensorrt.library import Library


@pytest.fixture(scope="session")
def trt() -> ModuleType:
    module: ModuleType = pytest.importorskip("tensorrt", reason="TensorRT is not installed: run .ci/bindings")
    return module


@pytest.fixture
def trt_with_plugins(trt: ModuleType) -> ModuleType:
    if Library(trt).version_numbers < MINIMUM_VERSION:
        pytest.skip(f"TensorRT {trt.__version__} has no tensorrt.plugin")
    return trt


@pytest.fixture
def trtp(trt_with_plugins: ModuleType) -> Iterator[ModuleType]:
    """TensorRT's module for plugins, without a registered plugin."""
    with expressions.installed(trt_with_plugins) as module:
        yield module
