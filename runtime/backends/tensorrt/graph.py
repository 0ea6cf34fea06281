"""One graph on TensorRT: its engines in execution order, each with an execution context per profile."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_edge.runtime.backends.tensorrt.kernel_cache import KernelCache
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages
from fusion_edge.runtime.bundle.engine_manifest import Engine
from fusion_edge.runtime.bundle.graphs import sized
from fusion_edge.runtime.errors import FusionError

DIMENSION_NAMES = {
    "text": "tokens of all questions",
    "questions": "questions of the conversation",
    "positions": "tokens of the prompt",
    "latents": "latents per question",
}
"""Names of dimensions in errors."""


class EngineGraph:
    """The engines of one graph. Partitions share tensors by name: an output of one is the input of the next."""

    def __init__(
        self, name: str, engines: Sequence[Engine], folder: Path, library: Library, runtime: Any, messages: Messages
    ) -> None:
        """Load the engines from ``folder``. Raises :class:`FusionError` if TensorRT refuses one."""
        self.name = name
        self.engines = engines
        self._library = library
        self._messages = messages
        self._loaded = [self._load(runtime, folder / engine.file.path, engine) for engine in engines]
        self._contexts: list[list[Any]] = []  # by profile, by partition

    def _load(self, runtime: Any, path: Path, engine: Engine) -> Any:
        self._messages.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            loaded = runtime.deserialize_cuda_engine(content)  # without a copy: a Jetson shares its memory with the GPU
        if loaded is None:
            raise FusionError(
                f"{self._library.name} cannot load {path}: {self._messages.first_error()}. If memory ran out, close "
                "other programs, or build with a smaller --max-context; otherwise build them again (fusion-build)."
            )
        names = {loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)}
        if names != {tensor["name"] for tensor in engine.tensors}:
            raise FusionError(f"{path} has inputs and outputs that its manifest does not list; build it again.")
        return loaded

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory of a run in bytes. Only one run at a time may use it."""
        return max(int(loaded.device_memory_size_v2) for loaded in self._loaded)

    def prepare(
        self, scratch: int, size: int, pointers: Mapping[str, int], stream: int, kernels: KernelCache | None
    ) -> None:
        """Create the execution contexts, with ``scratch`` memory and tensors at ``pointers``.

        ``kernels`` is TensorRT-RTX's cache of compiled kernels, None for TensorRT, whose engines are complete. Raises
        :class:`FusionError` if TensorRT fails.
        """
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        for profile, ranges in enumerate(self.engines[0].profiles):
            is_fixed = all(least == largest for least, _, largest in ranges.values())
            contexts = []
            for loaded, engine in zip(self._loaded, self.engines, strict=True):
                self._messages.clear()
                config = strategy if kernels is None else kernels.configure(loaded, is_fixed)
                context = loaded.create_execution_context(config)
                self._check(context is not None, "prepare")  # memory may have run out
                context.set_device_memory(scratch, size)
                self._check(context.set_optimization_profile_async(profile, stream), "prepare")
                for tensor in engine.tensors:
                    self._set_address(context, tensor["name"], pointers[tensor["name"]])
                contexts.append(context)
            self._contexts.append(contexts)

    def _set_address(self, context: Any, name: str, pointer: int) -> None:
        self._check(context.set_tensor_address(name, pointer), "bind the tensors of")

    def _check(self, is_done: bool, action: str) -> None:
        """Raise :class:`FusionError` with TensorRT's first error."""
        if not is_done:
            raise FusionError(f"{self._library.name} failed to {action} {self.name}: {self._messages.first_error()}.")

    def bind(self, profile: int, pointers: Mapping[str, int]) -> None:
        """Move inputs and outputs of a profile to other ``pointers``."""
        for context, engine in zip(self._contexts[profile], self.engines, strict=True):
            for name in pointers.keys() & {tensor["name"] for tensor in engine.tensors}:
                self._set_address(context, name, pointers[name])

    def set_dimensions(self, profile: int, dimensions: Mapping[str, int]) -> None:
        """Set the shapes of the next runs. Raise :class:`FusionError` for sizes outside a profile."""
        for name, size in dimensions.items():
            least, _, largest = self.engines[0].profiles[profile][name]
            if not least <= size <= largest:
                dimension = DIMENSION_NAMES.get(name, name)
                raise FusionError(
                    f"The question has {size} {dimension}, and the engines support {least} to {largest}; ask shorter "
                    "questions, drop history, or build with a larger --max-context."
                )
        for context, engine in zip(self._contexts[profile], self.engines, strict=True):
            for tensor in engine.inputs:
                if any(isinstance(size, str) for size in tensor["shape"]):
                    shape = sized(tensor["shape"], dimensions)
                    if not context.set_input_shape(tensor["name"], shape):
                        raise FusionError(
                            f"{self.name} does not accept {tensor['name']} of shape {shape}; build it again."
                        )

    def run(self, profile: int, stream: int, between: Callable[[], None] = lambda: None) -> None:
        """Enqueue every partition, and call ``between`` between two. Raise :class:`FusionError` if TensorRT fails."""
        self._messages.clear()
        for number, context in enumerate(self._contexts[profile]):
            if number:
                between()
            self._check(context.execute_async_v3(stream), "run")

    def free_contexts(self) -> None:
        """Free the execution contexts. Call this before freeing the engines."""
        self._contexts.clear()

    def close(self) -> None:
        """Free the engines, after everything made from them."""
        self._loaded.clear()
