"""A cache on disk of the kernels that TensorRT-RTX compiles on this machine's GPU.

An engine of TensorRT-RTX fits every GPU of an architecture. Each kernel is compiled when it first runs; the cache saves
that at the next start. TensorRT-RTX itself refuses kernels of another version or GPU.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from fusion_edge.runtime.system.user_cache import cache_folder


class KernelCache:
    """The kernels of a folder of engines, in one file of the user's cache folder."""

    def __init__(self, trt: ModuleType, name: str) -> None:
        """Use the module ``tensorrt_rtx``; ``name`` identifies the engines."""
        self._trt = trt
        self._path = cache_folder() / f"{name}.kernels"
        self._cache: Any = None
        self._configurations: list[Any] = []
        """Runtime configurations. They must outlive their contexts, and TensorRT's bindings keep no reference."""
        self._saved = b""

    def configure(self, engine: Any, is_fixed: bool) -> Any:
        """Return the configuration of an engine's execution contexts: with this cache, in memory of the caller.

        With ``is_fixed`` shapes the first run compiles the best kernels, because a CUDA graph captures them afterwards.
        With varying shapes they compile in the background of later runs.
        """
        config = engine.create_runtime_config()
        if is_fixed:
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._saved = self._read()
            if self._saved:
                self._cache.deserialize(self._saved)
        config.set_runtime_cache(self._cache)
        self._configurations.append(config)
        return config

    def close(self) -> None:
        """Free the cache, then the configurations: after the contexts, before the engines."""
        self._cache = None
        self._configurations.clear()

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            sys.stderr.write(f"warning: cannot read compiled kernels from {self._path}: {error.strerror}\n")
            return b""

    def save(self) -> None:
        """Save the compiled kernels. If the folder is not writable, the next start compiles them again."""
        content = bytes(memoryview(self._cache.serialize()))
        if content == self._saved:
            return
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(self._path)
        except OSError as error:
            sys.stderr.write(f"warning: cannot save compiled kernels in {self._path.parent}: {error.strerror}\n")
        self._saved = content
