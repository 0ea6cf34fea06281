"""Import ONNX Runtime: check that it is installed, complete and recent, and silence its own output."""

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

OLDEST = (1, 23, 2)
"""Oldest supported version, as in pyproject.toml; 1.23.0 lacks functions used here."""
OPSET_24_SINCE = (1, 24)
"""First version with the opset of bundles for TensorRT."""
FATAL = 4
"""Log severity. ONNX Runtime also raises its errors as exceptions, which become messages of ours."""
OWN_OUTPUT = re.compile(rb"onnxruntime|\bort\b|device_discovery|cpuid_info", re.IGNORECASE)


def find_onnxruntime(extra: str = "cpu") -> ModuleType:
    """Import and return ``onnxruntime``, which the extra ``extra`` installs.

    Raises :class:`DeviceError` with the remedy, :class:`FusionError` if memory runs out.
    """
    try:
        with _quiet():
            import onnxruntime
            from onnxruntime import InferenceSession  # noqa: F401 (missing if one of two wheels was removed)
    except ModuleNotFoundError as error:
        if error.name == "onnxruntime":
            raise DeviceError(
                f"ONNX Runtime is not installed; run pip install '.[{extra}]' in a clone of fusion-edge."
            ) from None
        raise DeviceError(f"ONNX Runtime cannot be imported ({error}); {reinstall_command(extra)}.") from None
    except Exception as error:  # from the C++ library, or a file that another wheel has overwritten
        if is_out_of_memory(error):
            raise FusionError(f"{not_enough_memory('load ONNX Runtime')}; close other programs.") from None
        raise DeviceError(f"ONNX Runtime cannot be imported ({error}); {reinstall_command(extra)}.") from None
    version = getattr(onnxruntime, "__version__", "of an unknown version")
    if release_numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DeviceError(
            f"ONNX Runtime {version} is too old, {oldest} or newer is needed; {reinstall_command(extra)}."
        )
    onnxruntime.set_default_logger_severity(FATAL)
    _skip_destructors_in_forks()
    module: ModuleType = onnxruntime
    return module


def opset_24_unsupported_reason() -> str | None:
    """Return why ONNX Runtime cannot run bundles for TensorRT on the CPU, as a sentence; None if it can."""
    try:
        version = find_onnxruntime().__version__
    except DeviceError as error:
        return str(error)
    if release_numbers(version) < OPSET_24_SINCE:
        return f"ONNX Runtime {version} has no opset 24; 1.24 and later have, for Python 3.11 and later."
    return None


@functools.cache
def _skip_destructors_in_forks() -> None:
    """Make forked processes exit without the destructors of C++ static objects.

    ONNX Runtime's destructors would wait forever for a thread that only the parent has.
    """
    libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=lambda: libc.on_exit(libc._exit, None))


def reinstall_command(extra: str) -> str:
    """Return the command that replaces both wheels, which hold the same files and break each other."""
    return f"pip uninstall -y onnxruntime onnxruntime-gpu, then pip install '.[{extra}]' in a clone of fusion-edge"


def is_installed(distribution: str) -> bool:
    """Return whether a distribution is installed."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def release_numbers(version: str) -> tuple[int, ...]:
    """``1.23.0rc1`` -> (1, 23, 0)."""
    return tuple(map(int, re.findall(r"(?:^|\.)(\d+)", version)[:3]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the output of ONNX Runtime on standard error while it loads, before its logger can be silenced.

    Print other output afterwards. Do nothing if ONNX Runtime is loaded already.
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
            rest = b"".join(line for line in file.readall().splitlines(keepends=True) if not OWN_OUTPUT.search(line))
        os.write(2, rest)
