"""The fakes of TensorRT and CUDA have the names and parameters of the real modules, where those are installed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

import pytest
from fakes import fake_cuda, fake_tensorrt, fake_tensorrt_runtime
from fakes.fake_cuda import FakeCuda

CLASSES = [
    one
    for module in (fake_tensorrt, fake_tensorrt_runtime)
    for one in vars(module).values()
    if isinstance(one, type) and one.__module__ == module.__name__ and not issubclass(one, ModuleType)
]
CUDA_ENUMS = {
    "cudaError_t": fake_cuda.Error,
    "cudaMemcpyKind": fake_cuda.CopyKind,
    "cudaStreamCaptureMode": fake_cuda.CaptureMode,
    "cudaDeviceAttr": fake_cuda.Attribute,
}


@pytest.fixture(scope="module")
def tensorrt_rtx() -> ModuleType:
    module: ModuleType = pytest.importorskip("tensorrt_rtx")
    return module


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    module: ModuleType = pytest.importorskip("cuda.bindings.runtime")
    return module


def parameters(function: FunctionType) -> list[str]:
    """Return the parameters of a fake's method, without ``self`` and ``module``."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "module")]


def documented(function: Any) -> Iterator[list[str]]:
    """Yield the parameters of every overload of a TensorRT function, from the first lines of its documentation."""
    for arguments in re.findall(rf"^(?:\d+\. )?{function.__name__}\((self: .*)\) -> ", function.__doc__, re.MULTILINE):
        yield re.findall(r"(?:^|, )(\w+): ", arguments)[1:]


@pytest.mark.parametrize("fake", CLASSES, ids=lambda one: one.__qualname__)
def test_the_fake_of_tensorrt_has_names_and_parameters_of_the_module(tensorrt_rtx: ModuleType, fake: type) -> None:
    real = getattr(tensorrt_rtx, fake.__name__)
    if issubclass(fake, Enum):
        assert set(fake.__members__) <= set(dir(real))
        return
    if fake is fake_tensorrt_runtime.ILogger:
        assert set(fake.Severity.__members__) <= set(dir(real.Severity))
    members = vars(fake) | fake.__annotations__
    public = [name for name in members if not name.startswith("_")]
    for name in public:
        assert hasattr(real, name)
    constructor = ["__init__"] if fake.__name__ in ("Builder", "OnnxParser", "Runtime") else []
    for name in (*constructor, *(name for name in public if isinstance(members[name], FunctionType))):
        wanted = parameters(members[name])
        assert any(wanted == names[: len(wanted)] for names in documented(getattr(real, name)))


def test_the_fake_module_has_only_names_of_the_module(tensorrt_rtx: ModuleType) -> None:
    fake = fake_tensorrt.FakeTensorRT(*fake_tensorrt.RTX, FakeCuda())
    for name in (*vars(fake_tensorrt.FakeTensorRT), *vars(fake)):
        if name[0].isupper():
            assert hasattr(tensorrt_rtx, name)


def test_the_fake_of_cuda_has_the_parameters_of_the_bindings(cuda: ModuleType) -> None:
    functions = [name for name in vars(FakeCuda) if re.match("cuda[A-Z]", name)]
    assert len(functions) == 24
    for name in functions:
        wanted = parameters(vars(FakeCuda)[name])
        assert list(inspect.signature(getattr(cuda, name)).parameters) == wanted


@pytest.mark.parametrize("name", CUDA_ENUMS)
def test_enumerations_equal_those_of_the_bindings(cuda: ModuleType, name: str) -> None:
    real = getattr(cuda, name)
    for member in CUDA_ENUMS[name]:
        assert getattr(real, member.name).value == member.value


def test_results_have_the_types_of_the_bindings(cuda: ModuleType) -> None:
    """Functions that need no GPU return an error code, then results."""
    for module in (cuda, FakeCuda()):
        error, text = module.cudaGetErrorString(module.cudaError_t.cudaErrorMemoryAllocation)
        assert error == module.cudaError_t.cudaSuccess
        assert isinstance(text, bytes)
        error, *count = module.cudaGetDeviceCount()
        assert isinstance(error, module.cudaError_t)
        assert len(count) == 1
