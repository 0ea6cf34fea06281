"""Finding ONNX Runtime: that it is there, whole and recent enough, and says nothing of its own."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType

from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory

OLDEST = (1, 23, 2)  # as in pyproject.toml: 1.23.0 lacks functions that we call
FATAL = 4  # severity: every error is an exception, too, and becomes a sentence of ours
OWN_WORDS = re.compile(rb"onnxruntime|\bort\b|device_discovery|cpuid_info", re.IGNORECASE)


def find_onnxruntime(extra: str = "cpu") -> ModuleType:
    """The module ``onnxruntime``; ``extra`` is what brings it. Raises :class:`DeviceError` with the remedy,
    :class:`FusionError` if memory runs out.
    """
    try:
        with _quiet():
            import onnxruntime
            from onnxruntime import InferenceSession  # noqa: F401 (where one of two wheels was removed, this is missing)
    except ModuleNotFoundError as error:
        if error.name == "onnxruntime":
            raise DeviceError(
                f"ONNX Runtime is not installed; run pip install '.[{extra}]' in a clone of fusion-edge."
            ) from None
        raise DeviceError(f"ONNX Runtime cannot be imported ({error}); {install_anew(extra)}.") from None
    except Exception as error:  # of a library in C++, or of a Python file that another wheel has replaced
        if is_out_of_memory(error):
            raise FusionError(f"{not_enough_memory('load ONNX Runtime')}; close other programs.") from None
        raise DeviceError(f"ONNX Runtime cannot be imported ({error}); {install_anew(extra)}.") from None
    version = getattr(onnxruntime, "__version__", "of an unknown version")
    if _numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DeviceError(f"ONNX Runtime {version} is too old, {oldest} or newer is needed; {install_anew(extra)}.")
    onnxruntime.set_default_logger_severity(FATAL)
    _let_forks_end()
    module: ModuleType = onnxruntime
    return module


@functools.cache
def _let_forks_end() -> None:
    """Have processes that are forked from now on end without C++'s destructors of static objects, which come last.

    ONNX Runtime's would wait for a thread that only the parent has, and never return.
    """
    libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=lambda: libc.on_exit(libc._exit, None))


def install_anew(extra: str) -> str:
    """Both wheels hold the module ``onnxruntime``: one over the other breaks it, and so does removing one of two."""
    return f"pip uninstall -y onnxruntime onnxruntime-gpu, then pip install '.[{extra}]' in a clone of fusion-edge"


def is_installed(distribution: str) -> bool:
    """Whether pip has installed a distribution."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """``1.23.0rc1`` -> (1, 23, 0)."""
    return tuple(map(int, re.findall(r"(?:^|\.)(\d+)", version)[:3]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard error without what ONNX Runtime's libraries print while they are loaded, before they can be told.

    What others print in the meantime comes afterwards. Nothing is done if it is loaded already.
    """
    if "onnxruntime" in sys.modules or sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    printed, before = os.memfd_create("stderr"), os.dup(2)
    os.dup2(printed, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        with open(printed, "rb", buffering=0) as file:
            file.seek(0)
            rest = b"".join(line for line in file.readall().splitlines(keepends=True) if not OWN_WORDS.search(line))
        os.write(2, rest)
