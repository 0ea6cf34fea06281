"""The LLM on ONNX Runtime, with its KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fusion_edge.runtime.backends.base import Floats, check_capacity
from fusion_edge.runtime.backends.onnxruntime.graph import Graph, Input, translate_errors
from fusion_edge.runtime.bundle import graphs
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.errors import FusionError

LONG_STEP_BYTES = 100_000_000
"""Size of a bundle from which a decode step takes milliseconds, so that it has to be interruptible."""


class LlmSession:
    """The LLM with its KV cache, which is allocated once and bound as input and output, so updated in place.

    A sequence uses the start of the cache's memory, up to its capacity: prefill of an int8 cache copies everything
    after the prompt. On a CPU, memory that no sequence has reached has no pages.

    Decode steps overwrite the same input tensors and write the same array of logits: a step allocates and binds
    nothing.
    """

    def __init__(self, graph: Graph, manifest: Manifest) -> None:
        self._graph = graph
        self._context = manifest.max_context
        self._length = self._capacity = 0
        self._has_long_steps = manifest.size >= LONG_STEP_BYTES
        self._specs = graphs.cache_specs(manifest.model, manifest.cache)
        self._logits: Floats = np.zeros((1, manifest.model.language.vocab_size), np.float32)
        self._outputs = {"logits": ort.OrtValue.ortvalue_from_numpy(self._logits)}
        with translate_errors(graph.name, graph.device):  # a GPU may lack memory
            self._memory = {spec.name: self._zeros(spec) for spec in self._specs}
            self._decode_inputs = {name: graph.tensor(name, data) for name, data in self._zero_inputs(manifest).items()}
        self._decode_binding: ort.IOBinding | None = None

    def _zeros(self, spec: graphs.TensorSpec) -> ort.OrtValue:
        return self._graph.tensor(f"past.{spec.name}", np.zeros(math.prod(_shape(spec, self._context)), spec.dtype))

    def _zero_inputs(self, manifest: Manifest) -> dict[str, npt.NDArray[np.float32]]:
        """Return the inputs of a decode step, all zero: one row and no latents."""
        alignment, width = manifest.model.alignment, manifest.model.language.hidden_size
        context = (alignment.layers, 0, alignment.window_size**2, width)
        shapes = {
            "embeddings": (1, 1, width),
            "latent_positions": (0, 0),
            "question_positions": (0,),
            "keys": context,
            "values": context,
            "last_position": (1,),
            "total_length": (),
            "positions": (1, 1),  # TensorRT bundles only, as write_index
            "write_index": (1,),
            "is_prefill": (),  # int8 caches only
        }
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name in self._graph.inputs}

    def prefill(self, inputs: Mapping[str, Input], length: int, capacity: int) -> Floats:
        """Start a sequence of ``length`` tokens that may grow to ``capacity``; return the logits ``[V]``."""
        if capacity > self._context:
            raise FusionError(
                f"A sequence of {capacity} tokens exceeds the bundle's context of {self._context}; export with a "
                "larger --max-context."
            )
        self._place(0, length, capacity)
        first = dict(inputs)
        if "positions" in self._graph.inputs:
            first["positions"] = np.arange(length)[None]
        if "is_prefill" in self._graph.inputs:
            first["is_prefill"] = np.ones((), np.bool_)
        with translate_errors(self._graph.name, self._graph.device):
            tensors = {name: self._graph.tensor(name, data) for name, data in first.items()}
            self._decode_binding = self._binding(self._decode_inputs)
            binding = self._binding(self._decode_inputs | tensors)
        self._graph.run_bound(binding)
        logits: Floats = self._logits[0]
        return logits

    def decode(self, embedding: Floats) -> Floats:
        """Append one token's embedding ``[D]``; return the logits ``[V]``."""
        self._place(self._length, 1, self._capacity)
        self._write("embeddings", embedding)
        assert self._decode_binding is not None  # before the first prefill the capacity is 0
        self._graph.run_bound_step(self._decode_binding, self._has_long_steps)
        logits: Floats = self._logits[0]
        return logits

    def _place(self, start: int, count: int, capacity: int) -> None:
        """Write the inputs that place ``count`` tokens after ``start``."""
        length = start + count
        check_capacity(length, capacity)
        self._length, self._capacity = length, capacity
        places = {"total_length": length, "last_position": length - 1, "positions": start, "write_index": start}
        for name in places.keys() & self._decode_inputs.keys():
            self._write(name, places[name])

    def _write(self, name: str, data: npt.ArrayLike) -> None:
        self._graph.write(name, self._decode_inputs[name], data)

    def _binding(self, inputs: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        binding = self._graph.binding(inputs, self._outputs)
        for spec in self._specs:
            names = f"past.{spec.name}", f"present.{spec.name}"
            self._graph.bind_in_place(binding, *names, self._memory[spec.name], _shape(spec, self._capacity))
        return binding


def _shape(spec: graphs.TensorSpec, capacity: int) -> tuple[int, ...]:
    return tuple(capacity if isinstance(size, str) else size for size in spec.shape)
