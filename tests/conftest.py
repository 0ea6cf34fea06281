"""Shared fixtures: a tiny checkpoint, its bundles, and commands that must fail."""

from __future__ import annotations

import os

# Pin each process of pytest-xdist to one core, before any library counts the cores. Otherwise the threads of NumPy,
# torch and ONNX Runtime in all processes wait for each other far longer than the small tests compute.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# Triton reads this when it defines kernels. They run on the CPU, one program after the other.
os.environ["TRITON_INTERPRET"] = "1"

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.export import cli
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, metavar="FILE", help="another build of the CPU kernels to test")


def pytest_configure(config: pytest.Config) -> None:
    # Background jobs ignore SIGINT, and nohup SIGHUP, also in child processes. Tests of signals need the defaults.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if (path := config.getoption("--kernels")) is not None:
        cpu_kernels.library = lambda: path.absolute()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Redirect the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-shard float16 checkpoint with random weights, Phi's layout and tokenizer: 16 patches, width 32, two layers.

    Read-only: copy it to change it.
    """
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "FUSION-tiny", TINY)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint`` exported with ``--int4``: query lengths 16 and 4, context of 512 tokens. Read-only."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), "--int4"]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_tensorrt_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint`` exported with ``--fp16 --target tensorrt``, without engines. Read-only."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), "--fp16", "--target", "tensorrt"]) == 0
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Path of a new bundle in an empty folder."""
    (tmp_path / "output").mkdir()
    return tmp_path / "output/bundle"


@pytest.fixture
def replaceable(tiny_bundle: Path, output: Path) -> Path:
    """A bundle at ``output``."""
    shutil.copytree(tiny_bundle, output)
    return output


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(main, *arguments, code=1)`` runs a command that must fail with an exit code.

    It returns the error, which is one line on standard error.
    """

    def run(main: Callable[[list[str]], int], *arguments: object, code: int = 1) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.splitlines(keepends=True) == [message]
        return message

    return run
