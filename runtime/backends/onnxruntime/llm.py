"""The LLM on ONNX Runtime, with its KV cache."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fusion_edge.runtime.backends.base import Floats, KvPrefix, check_capacity, check_rewind
from fusion_edge.runtime.backends.onnxruntime.graph import Graph, Input, translate_errors
from fusion_edge.runtime.bundle import graphs
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.errors import FusionError

LONG_STEP_BYTES = 100_000_000
"""Size of a bundle from which a decode step takes milliseconds, so that it has to be interruptible."""
KvMemory = Mapping[str, ort.OrtValue]
"""Memory of a KV cache of the whole context, by tensor of the cache. On a CPU, unused memory has no pages."""


class LlmSession:
    """The LLM with its KV cache, which is bound as input and output, so updated in place.

    Graphs with per-token scales (:func:`fusion_edge.runtime.bundle.graphs.has_per_token_scales`) write the rows of a
    prompt behind those that they read, and the row of a decode step to memory of its own, from which it is copied.

    A sequence uses the start of the session's memory, up to its capacity: prefill of an int8 cache copies everything
    after the prompt. A prefix has memory of its own, and sequences behind it use the rest of it, so nothing is copied.

    Decode steps overwrite the same input tensors and write the same array of logits: a step allocates and binds
    nothing.
    """

    def __init__(self, graph: Graph, manifest: Manifest) -> None:
        self._graph = graph
        self._context = manifest.max_context
        self._has_long_steps = manifest.size >= LONG_STEP_BYTES
        self._specs = manifest.cache_specs
        self._has_per_token_scales = manifest.has_per_token_scales
        self._logits: Floats = np.zeros((1, manifest.model.language.vocab_size), np.float32)
        self._outputs = {"logits": ort.OrtValue.ortvalue_from_numpy(self._logits)}
        with translate_errors(graph.name, graph.device):  # a GPU may lack memory
            self._memory = self._new_memory()
            self._decode_inputs = {name: graph.tensor(name, data) for name, data in self._zero_inputs(manifest).items()}
            self._row = {spec.name: self._zeros(spec, 1) for spec in self._specs} if self._has_per_token_scales else {}
            """Cache rows of the last decode step; only with per-token scales."""
        self._end()

    def _end(self) -> None:
        """End the sequence. It held the memory of its prefix."""
        self._length = self._capacity = 0
        self._prefix: KvPrefix | None = None
        self._decode_binding: ort.IOBinding | None = None

    def _new_memory(self) -> KvMemory:
        return {spec.name: self._zeros(spec, self._context) for spec in self._specs}

    def _zeros(self, spec: graphs.TensorSpec, tokens: int) -> ort.OrtValue:
        name = f"{'slots' if self._has_per_token_scales else 'past'}.{spec.name}"
        return self._graph.tensor(name, np.zeros(math.prod(_shape(spec, tokens)), spec.dtype))

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
            "prefix": (0,),  # with per-token scales only
            "is_prefill": (),  # other int8 caches only
        }
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name in self._graph.inputs}

    def prefill(
        self, inputs: Mapping[str, Input], length: int, capacity: int, prefix: KvPrefix | None = None
    ) -> Floats:
        """Start a sequence, or continue ``prefix``, with ``length`` tokens; return the logits ``[V]``.

        The sequence may grow to ``capacity`` tokens, the prefix included.
        """
        if capacity > self._context:
            raise FusionError(
                f"A sequence of {capacity} tokens exceeds the bundle's context of {self._context}; export with a "
                "larger --max-context."
            )
        start = 0 if prefix is None else prefix.length
        self._place(start, length, capacity)
        self._prefix = prefix
        memory, bound = (self._memory, capacity) if prefix is None else (prefix.memory, self._context)
        with translate_errors(self._graph.name, self._graph.device):
            if "slots" in self._graph.inputs:  # TensorRT bundles only; attention reads the whole cache
                self._decode_inputs["slots"] = self._graph.tensor("slots", np.arange(bound))
            self._decode_binding = self._step_binding(memory, bound)
        self._run_prompt(inputs, start, length, memory, bound)
        logits: Floats = self._logits[0]
        return logits

    def prefill_prefix(self, embeddings: npt.NDArray[np.float32], length: int) -> KvPrefix:
        """Run the start of prompts, ``[1,L,D]``, in memory of its own. The sequence ends."""
        self._end()
        with translate_errors(self._graph.name, self._graph.device):
            memory = self._new_memory()
        self._write_places(0, length)
        self._run_prompt({"embeddings": embeddings}, 0, length, memory, self._context)
        return KvPrefix(length, memory)

    def _run_prompt(self, inputs: Mapping[str, Input], start: int, length: int, memory: KvMemory, bound: int) -> None:
        """Run ``length`` tokens from position ``start``, in a cache of ``bound`` tokens."""
        first = dict(inputs)
        if "positions" in self._graph.inputs:
            first["positions"] = np.arange(start, start + length)[None]
        if "slots" in self._graph.inputs:
            first["slots"] = np.arange(0 if self._has_per_token_scales else start + length)
        if "prefix" in self._graph.inputs:
            first["prefix"] = np.arange(start)
        if "is_prefill" in self._graph.inputs and start == 0:  # later tokens take the scales of the first ones
            first["is_prefill"] = np.ones((), np.bool_)
        with translate_errors(self._graph.name, self._graph.device):
            tensors = {name: self._graph.tensor(name, data) for name, data in first.items()}
            inputs_of_run = self._decode_inputs | tensors
            if self._has_per_token_scales:
                binding = self._row_binding(inputs_of_run, memory, 0, start)
                self._bind_rows(binding, memory, start, length)
            else:
                binding = self._binding(inputs_of_run, memory, bound)
        self._graph.run_bound(binding)

    def decode(self, embedding: Floats) -> Floats:
        """Append one token's embedding ``[D]``; return the logits ``[V]``."""
        self._place(self._length, 1, self._capacity)
        self._write("embeddings", embedding)
        assert self._decode_binding is not None  # before the first prefill the capacity is 0
        self._graph.run_bound_step(self._decode_binding, self._has_long_steps)
        self._store_row()
        logits: Floats = self._logits[0]
        return logits

    def rewind(self, length: int) -> None:
        """Drop the tokens after the first ``length``."""
        check_rewind(length, 0 if self._prefix is None else self._prefix.length, self._length)
        self._length = length

    def _place(self, start: int, count: int, capacity: int) -> None:
        """Append ``count`` tokens after ``start`` to the sequence."""
        check_capacity(start + count, capacity)
        self._length, self._capacity = start + count, capacity
        self._write_places(start, count)

    def _write_places(self, start: int, count: int) -> None:
        """Write the inputs that place ``count`` tokens after ``start``."""
        length = start + count
        places = {"total_length": length, "last_position": length - 1, "positions": start, "write_index": start}
        for name in places.keys() & self._decode_inputs.keys():
            self._write(name, places[name])

    def _write(self, name: str, data: npt.ArrayLike) -> None:
        self._graph.write(name, self._decode_inputs[name], data)

    def _step_binding(self, memory: KvMemory, bound: int) -> ort.IOBinding:
        """Bind decode steps with a cache of ``bound`` tokens."""
        if not self._has_per_token_scales:
            return self._binding(self._decode_inputs, memory, bound)
        binding = self._row_binding(self._decode_inputs, memory, bound, 0)
        self._bind_rows(binding, self._row, 0, 1)
        return binding

    def _row_binding(
        self, inputs: Mapping[str, ort.OrtValue], memory: KvMemory, slots: int, prefix: int
    ) -> ort.IOBinding:
        """Bind the inputs, the logits, and the start of ``memory`` as cache of a decode step, or as prefix."""
        binding = self._graph.binding(inputs, self._outputs)
        for spec in self._specs:
            for way, tokens in (("slots", slots), ("prefix", prefix)):
                pointer = memory[spec.name].data_ptr()
                self._graph.bind_input(binding, f"{way}.{spec.name}", pointer, _shape(spec, tokens))
        return binding

    def _bind_rows(self, binding: ort.IOBinding, memory: KvMemory, start: int, count: int) -> None:
        """Bind the cache rows of ``count`` new tokens to ``memory``, from row ``start`` on."""
        for spec in self._specs:
            pointer = memory[spec.name].data_ptr() + start * graphs.row_bytes(spec)
            self._graph.bind_output(binding, f"new.{spec.name}", pointer, _shape(spec, count))

    def _store_row(self) -> None:
        """Copy the row of a decode step to its place in a cache with per-token scales."""
        memory = self._memory if self._prefix is None else self._prefix.memory
        for spec in self._specs if self._has_per_token_scales else ():
            size = graphs.row_bytes(spec)
            target = memory[spec.name].data_ptr() + (self._length - 1) * size
            ctypes.memmove(target, self._row[spec.name].data_ptr(), size)

    def _binding(self, inputs: Mapping[str, ort.OrtValue], memory: KvMemory, bound: int) -> ort.IOBinding:
        """Bind the inputs, the logits, and ``memory`` as a cache of ``bound`` tokens."""
        binding = self._graph.binding(inputs, self._outputs)
        for spec in self._specs:
            names = f"past.{spec.name}", f"present.{spec.name}"
            self._graph.bind_in_place(binding, *names, memory[spec.name], _shape(spec, bound))
        return binding


def _shape(spec: graphs.TensorSpec, capacity: int) -> tuple[int, ...]:
    return tuple(capacity if isinstance(size, str) else size for size in spec.shape)
