"""The fakes of TensorRT and CUDA have the names and parameters of the real modules, and no others."""

from __future__ import annotations

import inspect
import re
from enum import Enum
from types import FunctionType, ModuleType

import pytest
from fakes import fake_cuda, fake_tensorrt, fake_tensorrt_names, fake_tensorrt_runtime
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, JETPACK_6, RTX, FakeTensorRT
from fakes.fake_tensorrt_plugin import FakePlugins
from support.tensorrt_signatures import ENUMERATION, OVERLOAD, committed, parameters

CLASSES = [
    one
    for module in (fake_tensorrt, fake_tensorrt_runtime)
    for one in vars(module).values()
    if isinstance(one, type) and one.__module__ == module.__name__ and not issubclass(one, (ModuleType, Enum))
]
CUDA_ENUMS = {
    "cudaError_t": fake_cuda.Error,
    "cudaMemcpyKind": fake_cuda.CopyKind,
    "cudaStreamCaptureMode": fake_cuda.CaptureMode,
    "cudaDeviceAttr": fake_cuda.Attribute,
}


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    module: ModuleType = pytest.importorskip("cuda.bindings.runtime")
    return module


def own_parameters(function: FunctionType) -> list[str]:
    """Return the parameters of a fake's method, without ``self`` and ``module``."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "module")]


def fits(function: FunctionType, signature: str) -> bool:
    """Return whether the parameters of a fake's method are the first of a real one, which requires no others."""
    real, positional = parameters(signature), inspect.Parameter.POSITIONAL_ONLY
    given = [inspect.signature(function).parameters[name] for name in own_parameters(function)]
    names = [one.name == name or one.kind is positional for one, name in zip(given, real, strict=False)]
    return len(given) <= len(real) and all(names) and not any(list(real.values())[len(given) :])


@pytest.mark.parametrize("fake", CLASSES, ids=lambda one: one.__qualname__)
def test_classes_have_names_and_parameters_of_the_modules(fake: type) -> None:
    known = {name for signatures in committed().values() for name in signatures}
    members = vars(fake) | inspect.get_annotations(fake)
    public = {name for name in members if not name.startswith("_")} - {"Severity"}
    assert {f"{fake.__name__}.{name}" for name in public} <= known
    constructor = ["__init__"] if fake.__name__ in ("Builder", "OnnxParser", "Runtime") else []
    for name in (*constructor, *(name for name in public if isinstance(members[name], FunctionType))):
        real = [signatures.get(f"{fake.__name__}.{name}") for signatures in committed().values()]
        assert any(real)
        for overloads in filter(None, real):
            assert any(fits(members[name], one) for one in overloads.split(OVERLOAD))


def test_plugins_have_names_of_the_module() -> None:
    names = {f"plugin.{name}" for name in vars(FakePlugins) if not name.startswith("_")}
    assert names <= fake_tensorrt_names.signatures(*FULL).keys()
    registering = ["register", "autotune", "aot_impl"]
    assert [own_parameters(vars(FakePlugins)[name]) for name in registering] == [["plugin_id"]] * 3


@pytest.mark.parametrize("library", [FULL, JETPACK_6, RTX], ids=str)
def test_the_module_has_the_enumerations_of_the_version(library: tuple[str, str]) -> None:
    fake, known = FakeTensorRT(*library, FakeCuda()), fake_tensorrt_names.signatures(*library)
    for name, kind in known.items():
        outer, _, member = name.rpartition(".")
        if known.get(outer) == ENUMERATION and kind.isdecimal():
            owner = fake_tensorrt_runtime.ILogger.Severity if outer == "ILogger.Severity" else getattr(fake, outer)
            assert owner[member].value == int(kind)
    assert hasattr(fake, "ComputeCapability") == (library == RTX)
    assert int(fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == (library != RTX)


def test_versions_between_the_committed_ones() -> None:
    """A fake of 10.8 has the signatures of 10.3: those of 10.9 may be too new for it."""
    names = fake_tensorrt_names.signatures
    assert names("tensorrt", "10.8.0") == names("tensorrt", "10.3.0")
    assert "plugin.register" not in names("tensorrt", "10.8.0")
    assert "plugin.register" in names("tensorrt", "10.9.1")


def test_the_fake_of_cuda_has_the_parameters_of_the_bindings(cuda: ModuleType) -> None:
    functions = [name for name in vars(FakeCuda) if re.match("cuda[A-Z]", name)]
    assert len(functions) == 24
    for name in functions:
        wanted = own_parameters(vars(FakeCuda)[name])
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
