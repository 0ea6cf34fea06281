"""Kernels that TensorRT-RTX compiled on this machine's GPU, kept from one process to the next.

Its engines fit every GPU of an architecture: they are finished where they run, kernel by kernel, when those first run.
Kept kernels save that at the next start. TensorRT-RTX itself refuses what another version or GPU has left.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class KernelCache:
    """One file of the user's cache folder."""

    def __init__(self, trt: ModuleType, name: str) -> None:
        """``trt`` is ``tensorrt_rtx``; ``name`` tells the engines apart that kernels are for."""
        self._trt = trt
        self._path = cache_folder() / f"{name}.kernels"
        self._cache: Any = None
        self._configurations: list[Any] = []
        """Of contexts, which they must outlive; nothing in TensorRT's bindings keeps them."""
        self._kept = b""

    def configure(self, engine: Any, is_fixed: bool) -> Any:
        """How execution contexts of an engine are made: with this cache, in memory that is given to them.

        ``is_fixed``: shapes never change. The best kernels are then compiled in the first run, as that which is
        recorded behind it stays as it is; for other shapes they are compiled beside runs that make do without them.
        """
        config = engine.create_runtime_config()
        if is_fixed:
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._kept = self._read()
            if self._kept:
                self._cache.deserialize(self._kept)
        config.set_runtime_cache(self._cache)
        self._configurations.append(config)
        return config

    def close(self) -> None:
        """Free the cache, then the configurations that it is from: after all contexts, before their engines."""
        self._cache = None
        self._configurations.clear()

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            sys.stderr.write(f"Compiled kernels cannot be read from {self._path}: {error.strerror}\n")
            return b""

    def save(self) -> None:
        """Keep what has been compiled so far. A folder that cannot be written costs the next start some seconds."""
        content = bytes(memoryview(self._cache.serialize()))
        if content == self._kept:
            return
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(self._path)
        except OSError as error:
            sys.stderr.write(f"Compiled kernels cannot be kept in {self._path.parent}: {error.strerror}\n")
        self._kept = content


def cache_folder() -> Path:
    """Where the XDG base directory specification puts what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fusion-edge"
