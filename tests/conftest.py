"""A FUSION checkpoint that exports and answers in a fraction of a second, for tests that need one, whatever it says."""

from __future__ import annotations

import os

# One core for each process of pytest-xdist, before anything counts the cores: threads of numpy, torch and ONNX Runtime
# in all of them would wait for each other many times as long as these small products take.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# Read when Triton's kernels are defined: they run on the CPU, one program after the other.
os.environ["TRITON_INTERPRET"] = "1"

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.export import cli
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, metavar="FILE", help="another build of the CPU kernels to test")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--kernels")) is not None:
        cpu_kernels.library = lambda: path.absolute()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's cache folder, for as long as tests run."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-shard float16 checkpoint with random weights, Phi's layout and tokenizer: 16 patches, width 32, two layers.

    Read it only: a test that needs it broken copies it first.
    """
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "FUSION-tiny", TINY)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint`` exported with ``--int4``; offers query lengths 16 and 4 and 512 positions. Read it only."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), "--int4"]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_tensorrt_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint`` exported with ``--fp16 --target tensorrt``, without engines. Read it only."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), "--fp16", "--target", "tensorrt"]) == 0
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A place for a bundle in an empty folder."""
    (tmp_path / "output").mkdir()
    return tmp_path / "output/bundle"


@pytest.fixture
def replaceable(tiny_bundle: Path, output: Path) -> Path:
    """A bundle in that place."""
    shutil.copytree(tiny_bundle, output)
    return output


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(main, *arguments, code=1)`` runs a command that must fail with this exit code and one line on
    standard error, which it returns.
    """

    def run(main: Callable[[list[str]], int], *arguments: object, code: int = 1) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.splitlines(keepends=True) == [message]
        return message

    return run
