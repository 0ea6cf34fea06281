"""What our code uses of TensorRT exists, and takes the arguments it is given, in every version that runs it."""

from __future__ import annotations

import ast
import re
from threading import Event
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT
from support.tensorrt_signatures import OVERLOAD, committed, parameters, problems, read, results
from support.tensorrt_usage import CONDITIONS, FULL, MODULES, RTX, Condition, all_uses, sources, uses_of

from fusion_edge.export.engines import builder
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages
from fusion_edge.runtime.system.progress import Progress

COMMITTED = committed()
RESULTS = results(COMMITTED.values())


@pytest.fixture(params=[FULL, RTX])
def library(request: pytest.FixtureRequest) -> Library:
    """An installed module; .ci/bindings installs several versions of TensorRT, and ./test TensorRT-RTX."""
    reason = f"{request.param} is not installed" + (": run .ci/bindings" if request.param == FULL else "")
    module: ModuleType = pytest.importorskip(request.param, reason=reason)
    return Library(module)


def found(source: str, library: str = FULL, version: str = "10.16.1.11") -> list[str]:
    """Return the problems of a source with a version of TensorRT."""
    uses = uses_of("ours.py", ast.parse(source), RESULTS)
    return list(problems(uses, library, version, COMMITTED[library, version]))


def test_versions_include_those_of_jetpack_and_the_oldest_with_plugins() -> None:
    versions = [version.split(".")[:2] for library, version in COMMITTED if library == FULL]
    assert versions[:4] == [["10", "3"], ["10", "9"], ["10", "13"], ["10", "16"]]
    assert versions[4][0] == "11"
    assert RTX in {library for library, _ in COMMITTED}


@pytest.mark.parametrize(("library", "version"), COMMITTED, ids=str)
def test_every_use_fits_the_version(library: str, version: str) -> None:
    assert list(problems(all_uses(RESULTS), library, version, COMMITTED[library, version])) == []


def test_every_use_fits_the_installed_module(library: Library) -> None:
    """Also of a version whose signatures are not committed, such as JetPack's."""
    signatures = read(library.module)
    uses = all_uses(results([signatures]))
    assert list(problems(uses, library.name, library.version, signatures)) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("trt.Builder(logger, 3)", "no Builder, as used in ours.py:1; it has ['(logger: ILogger) -> None']."),
        ("trt.Builder()", "no Builder, "),
        ("trt.Bilder(logger)", "no Bilder, as used in ours.py:1; if the name is new to our code, run "),
        ("trt.NetworkDefinitionCreationFlag.WEAKLY_TYPED", "no NetworkDefinitionCreationFlag.WEAKLY_TYPED, "),
        ("library.module.BuilderFlag.REQUIRE_USER_ALLOCATION", "no BuilderFlag.REQUIRE_USER_ALLOCATION, "),
        ("trt.Builder(logger).create_net()", "no Builder.create_net, "),
        (
            "builder = trt.Builder(logger)\nbuilder.create_network(1, 2)",
            "no Builder.create_network, as used in ours.py:2; ",
        ),
        ("self._runtime = trt.Runtime(logger)\nself._runtime.load(content)", "no Runtime.load, "),
        ("trt.Runtime(logger).deserialize_cuda_engine(engine=content)", "no Runtime.deserialize_cuda_engine, "),
        (
            "def f(runtime: Any):\n one = runtime.deserialize_cuda_engine(a)\n one.num_io_tensors = 3\ntrt.Runtime",
            "no ICudaEngine.num_io_tensors, ",
        ),
        ("def f(runtime: Any):\n runtime.deserialize(a)\ntrt.Builder", "no *.deserialize, "),
        (
            "config = trt.Builder(one).create_builder_config()\nconfig.num_compute_capabilities = 1",
            "no IBuilderConfig.num_compute_capabilities, ",
        ),
        ("for one in [trt.Builder(a) for a in b]:\n one.create_network(flag=1)", "no Builder.create_network, "),
        ("def make():\n return trt.Builder(a)\nmake().create_network(flag=1)", "no Builder.create_network, "),
        ("trt.ILogger.__init__(self, 1)", "no ILogger.__init__, "),
        ("class Logger(trt.ILogger):\n def log(self, message): pass", "no ILogger.log, as used in ours.py:2; "),
        ("trtp.KernelLaunchParams(grid=1)", "no plugin.KernelLaunchParams, "),
        ("plugin_module.register()", "no plugin.register, "),
    ],
)
def test_a_wrong_use_is_found(source: str, problem: str) -> None:
    (sentence,) = found(source)
    assert sentence.startswith(f"tensorrt 10.16.1.11 has {problem}")


@pytest.mark.parametrize(
    "source",
    [
        "trt.Builder(logger).create_network()",
        "trt.Builder(logger=one).create_network(flags=1)",
        "trt.Builder(one).create_optimization_profile().set_shape(name, *shapes)",
        "trt.Builder(one).create_builder_config().progress_monitor = monitor",
        "builders = []\nbuilders.append(trt.Builder(one))\nbuilders[0].create_network()",
        "for a, b in zip(ours, [trt.Builder(one)]):\n a.anything(); b.create_network()",
        "ours.create_anything(1, 2, 3)",
        "trt.__version__.split('.')",
    ],
)
def test_a_right_use_is_accepted(source: str) -> None:
    assert found(source) == []


@pytest.mark.parametrize(
    ("source", "libraries"),
    [
        ("if library.is_rtx:\n trt.One()", [RTX]),
        ("if not self._library.is_rtx:\n trt.One()", [FULL]),
        ("if library.is_rtx:\n pass\nelse:\n trt.One()", [FULL]),
        ("def f():\n if library.is_rtx:\n  return\n trt.One()", [FULL]),
        ("x = trt.One() if library.is_rtx else None", [RTX]),
        ("if library.is_rtx:\n pass\ntrt.One()", [FULL, RTX]),
    ],
)
def test_conditions_in_the_source(source: str, libraries: list[str]) -> None:
    (use,) = (use for use in uses_of("ours.py", ast.parse(source), RESULTS) if use.names == ("One",))
    assert [one for one in (FULL, RTX) if use.condition.holds(one, "10.3.0")] == libraries


def test_variables_of_the_module_have_the_names_that_are_looked_for() -> None:
    found = set()
    for tree in sources().values():
        found |= {
            one.arg for one in ast.walk(tree) if isinstance(one, ast.arg) and ast.unparse(one).endswith(": ModuleType")
        }
        found |= set(re.findall(r"^\s*\(?(\w+).* = \(?[\w.]*library\.module\b(?!\.)", ast.unparse(tree), re.MULTILINE))
    assert {"trt", "trtp"} <= found <= MODULES.keys()


def test_conditions_by_name() -> None:
    """Every entry is in use, and a version before the first has none of its names."""
    for place, condition in CONDITIONS.items():
        path, _, function = place.partition(":")
        assert f"def {function}" in (ROOT / path).read_text("utf-8")
        assert condition in {use.condition for use in all_uses(RESULTS)}
    assert not Condition(since=(10, 14)).holds(FULL, "10.13.3.9")
    assert Condition(since=(10, 14)).holds(FULL, "11.0")
    assert Condition(since=(10, 14)).holds(RTX, "1.7")


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("()", {}),
        ("() -> int", {}),
        ("(self_: A, b: List[A] = ...) -> C", {"self_": True, "b": False}),
        ("(a: Callable[[A, B], C], d: D) -> E", {"a": True, "d": True}),
        ("(a, b = ..., c = ...)", {"a": True, "b": False, "c": False}),
    ],
)
def test_parameters(signature: str, expected: dict[str, bool]) -> None:
    assert parameters(signature) == expected


def test_every_committed_signature_can_be_read() -> None:
    for signatures in COMMITTED.values():
        for one in OVERLOAD.join(signatures.values()).split(OVERLOAD):
            if one.startswith("("):
                count = one.partition(")")[0].count(", ") + 1
                assert len(parameters(one)) == (0 if one.startswith("()") else count)


def test_our_logger_and_monitor_are_those_of_the_module(library: Library) -> None:
    """TensorRT calls both by position."""
    trt, messages = library.module, Messages(library)
    logger: Any = messages.logger()
    assert isinstance(logger, trt.ILogger)
    logger.log(trt.ILogger.Severity.WARNING, "ignored")
    logger.log(trt.ILogger.Severity.ERROR, "Out of\n memory.")
    assert messages.errors == ["Out of memory."]
    canceled = Event()
    with Progress("Building", 0, unit=None) as progress:
        monitor = builder._monitor(trt, progress, canceled)
        assert isinstance(monitor, trt.IProgressMonitor)
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0)
        canceled.set()
        assert not monitor.step_complete("Building", 1)
        monitor.phase_finish("Building")
