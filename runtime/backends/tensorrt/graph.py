"""One graph of a bundle on TensorRT: its engines, run in turn, each with an execution context for every profile."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_edge.runtime.backends.tensorrt.kernel_cache import KernelCache
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages
from fusion_edge.runtime.bundle.engine_manifest import Engine
from fusion_edge.runtime.bundle.graphs import sized
from fusion_edge.runtime.errors import FusionError

LIMITS = {
    "text": "tokens of all questions",
    "questions": "questions of the conversation",
    "positions": "positions of the prompt",
    "latents": "latents a question",
}
"""What a user knows a dimension as."""


class EngineGraph:
    """The engines of one graph. Tensors are bound by their names: what one part gives is where the next takes it."""

    def __init__(
        self, name: str, engines: Sequence[Engine], folder: Path, library: Library, runtime: Any, messages: Messages
    ) -> None:
        """Load the engines from ``folder``. Raises :class:`FusionError` if TensorRT refuses one."""
        self.name = name
        self.engines = engines
        self._library = library
        self._messages = messages
        self._loaded = [self._load(runtime, folder / engine.file.path, engine) for engine in engines]
        self._contexts: list[list[Any]] = []  # by profile, by part

    def _load(self, runtime: Any, path: Path, engine: Engine) -> Any:
        self._messages.errors.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            loaded = runtime.deserialize_cuda_engine(content)  # no copy: a Jetson's memory is the GPU's, too
        if loaded is None:
            raise FusionError(
                f"{self._library.name} cannot load {path}: {self._messages.first_error()}. If memory ran out, close "
                "other programs, or build with a smaller --max-context; else build the engines again (fusion-build)."
            )
        names = {loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)}
        if names != {tensor["name"] for tensor in engine.tensors}:
            raise FusionError(f"{path} has other inputs and outputs than its manifest says; build it again.")
        return loaded

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a run needs beside weights and tensors; one run at a time may use it."""
        return max(int(loaded.device_memory_size_v2) for loaded in self._loaded)

    def prepare(
        self, scratch: int, size: int, pointers: Mapping[str, int], stream: int, kernels: KernelCache | None
    ) -> None:
        """Make the execution contexts: they work in ``scratch`` and find their tensors at ``pointers``.

        ``kernels``: those that TensorRT-RTX compiles here; None for TensorRT, whose engines are complete. Raises
        :class:`FusionError` if TensorRT refuses.
        """
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        for profile, ranges in enumerate(self.engines[0].profiles):
            is_fixed = all(least == largest for least, _, largest in ranges.values())
            contexts = []
            for loaded, engine in zip(self._loaded, self.engines, strict=True):
                self._messages.errors.clear()
                how = strategy if kernels is None else kernels.configure(loaded, is_fixed)
                context = loaded.create_execution_context(how)
                self._check(context is not None, "prepare")  # memory may have run out
                context.set_device_memory(scratch, size)
                self._check(context.set_optimization_profile_async(profile, stream), "prepare")
                for tensor in engine.tensors:
                    self._set_address(context, tensor["name"], pointers[tensor["name"]])
                contexts.append(context)
            self._contexts.append(contexts)

    def _set_address(self, context: Any, name: str, pointer: int) -> None:
        self._check(context.set_tensor_address(name, pointer), "bind the tensors of")

    def _check(self, is_done: bool, what: str) -> None:
        """Raise :class:`FusionError` with what TensorRT says."""
        if not is_done:
            raise FusionError(f"{self._library.name} failed to {what} {self.name}: {self._messages.first_error()}.")

    def bind(self, profile: int, pointers: Mapping[str, int]) -> None:
        """Have a profile's runs find some inputs and outputs elsewhere."""
        for context, engine in zip(self._contexts[profile], self.engines, strict=True):
            for name in pointers.keys() & {tensor["name"] for tensor in engine.tensors}:
                self._set_address(context, name, pointers[name])

    def set_dimensions(self, profile: int, dimensions: Mapping[str, int]) -> None:
        """The shapes of the next runs. Raises :class:`FusionError` for sizes that the engines were not built for."""
        for name, size in dimensions.items():
            least, _, largest = self.engines[0].profiles[profile][name]
            if not least <= size <= largest:
                what = LIMITS.get(name, name)
                raise FusionError(
                    f"There are {size} {what}; the engines take {least} to {largest}: ask shorter questions, drop "
                    "history, or build with a larger --max-context."
                )
        for context, engine in zip(self._contexts[profile], self.engines, strict=True):
            for tensor in engine.inputs:
                if any(isinstance(size, str) for size in tensor["shape"]):
                    shape = sized(tensor["shape"], dimensions)
                    if not context.set_input_shape(tensor["name"], shape):
                        raise FusionError(f"{self.name} does not take {tensor['name']} of {shape}; build it again.")

    def run(self, profile: int, stream: int) -> None:
        """Every part, in the stream's order. Raises :class:`FusionError` if TensorRT refuses."""
        self._messages.errors.clear()
        for context in self._contexts[profile]:
            self._check(context.execute_async_v3(stream), "run")

    def free_contexts(self) -> None:
        """Free the execution contexts, before what they were made with."""
        self._contexts.clear()

    def close(self) -> None:
        """Free the engines, of which nothing may be left."""
        self._loaded.clear()
