"""The Python modules of TensorRT: ``tensorrt`` (Jetson and desktop) and ``tensorrt_rtx`` (desktop GPUs)."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fusion_edge.runtime.errors import DeviceError

LIBRARIES = ("tensorrt", "tensorrt-rtx")
INSTALL = {
    "tensorrt": "on a Jetson it comes with JetPack (create the environment with --system-site-packages); elsewhere "
    "run pip install tensorrt",
    "tensorrt-rtx": "pip install '.[tensorrt-rtx]' in a clone of fusion-edge (x86-64 only)",
}
FAILED_ALLOCATION = re.compile(
    r"out ?of ?memory|could not be allocated|bad_alloc|CUDA error 2\b|NvMapMemAlloc", re.IGNORECASE
)
"""Errors about an allocation that failed, such as ``CUDA error 2 for 622329856-byte allocation.`` on a Jetson. The
driver's allocator, NvMap, mostly prints past the logger, to standard error."""
SKIPPED_KERNEL = re.compile("skipping tactic", re.IGNORECASE)
"""Errors about a kernel that does not run. TensorRT goes on with the next one."""


@dataclass(frozen=True)
class Library:
    """An imported module of TensorRT. The two interfaces differ only by the properties of this class."""

    module: ModuleType

    @property
    def name(self) -> str:
        """Name of the module."""
        return self.module.__name__

    @property
    def version(self) -> str:
        """Version, such as ``10.3.0``."""
        return str(self.module.__version__)

    @property
    def version_numbers(self) -> tuple[int, ...]:
        """Major and minor version."""
        return tuple(int(part) for part in self.version.split(".")[:2])

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which builds without a GPU, compiles on the user's GPU, and has no plugins."""
        return self.name == "tensorrt_rtx"


def find_library(name: str) -> Library:
    """Import one of :data:`LIBRARIES`. Raises :class:`DeviceError` if it is not installed or does not load."""
    try:
        return Library(importlib.import_module(name.replace("-", "_")))
    except ImportError as error:
        detail = "" if isinstance(error, ModuleNotFoundError) else f" or does not load ({error})"
        raise DeviceError(f"{name} is not installed{detail}; {INSTALL[name]}.") from None


def first_library() -> Library:
    """Import the first installed one of :data:`LIBRARIES`. Raise :class:`DeviceError` if there is none."""
    reasons = []
    for name in LIBRARIES:
        try:
            return find_library(name)
        except DeviceError as error:
            reasons.append(str(error))
    raise DeviceError(f"TensorRT is not installed: {' '.join(reasons)}")


@dataclass
class Messages:
    """Collects the errors of TensorRT's logger, and prints all of its messages if ``verbose``."""

    library: Library
    verbose: bool = False
    errors: list[str] = field(default_factory=list)

    def logger(self) -> Any:
        """Return an ``ILogger`` that adds to these messages."""
        trt, messages = self.library.module, self

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                is_error = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
                messages.add(message, is_error)

        return Logger()

    def add(self, message: str, is_error: bool) -> None:
        """Add a message of the logger."""
        if is_error:
            self.errors.append(" ".join(message.split()))
        if self.verbose:
            sys.stderr.write(f"{message}\n")

    def clear(self) -> None:
        """Forget all messages, before a call whose errors count alone."""
        self.errors.clear()

    @property
    def out_of_memory(self) -> bool:
        """Whether an error says that memory ran out."""
        return any(FAILED_ALLOCATION.search(error) and not SKIPPED_KERNEL.search(error) for error in self.errors)

    def first_error(self) -> str:
        """Return the first error, shortened, as the end of a sentence."""
        return self.errors[0][:400].rstrip(".") if self.errors else "it gives no reason"
