"""ONNX Runtime: any CPU, and NVIDIA GPUs through its CUDA provider."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fusion_edge.runtime import graphs
from fusion_edge.runtime.backends.base import Floats, ImageAlignment, Integers
from fusion_edge.runtime.bundle import Bundle, data_file, graph_file
from fusion_edge.runtime.errors import FusionError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """See :class:`fusion_edge.runtime.backends.base.Backend`."""

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> None:
        """Load all three graphs. ``threads`` of None takes every core that this process may use.

        Raises :class:`FusionError` if the device's provider is not installed or a graph does not load.
        """
        self.name = f"onnxruntime-{device}"
        manifest = bundle.manifest
        self._activations = np.dtype(manifest.activations)
        options = _session_options(threads)
        sessions = {name: _session(bundle, name, device, options) for name in manifest.graphs}
        self._vision = sessions[graphs.VISION_ENCODER]
        self._alignment = sessions[graphs.ALIGNMENT_DECODER]
        self._run_options = _run_options(device)
        self._llm = _Decoder(sessions[graphs.LLM], bundle, device)

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Floats:
        inputs = {
            "pixel_values": pixels.astype(self._activations, copy=False),
            "text_embeds": text_embeds.astype(self._activations, copy=False),
            "text_mask": text_mask.astype(np.int32),
        }
        with _explained(graphs.VISION_ENCODER):
            (features,) = self._vision.run(None, inputs, self._run_options)
        return features.astype(np.float32, copy=False)  # type: ignore[no-any-return]

    def align(self, features: Floats, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        inputs = {
            "features": features.astype(self._activations, copy=False),
            "latent_cells": latent_cells,
            "context_cells": context_cells,
        }
        with _explained(graphs.ALIGNMENT_DECODER):
            latents, keys, values = self._alignment.run(None, inputs, self._run_options)
        return ImageAlignment(latents[0].astype(np.float32, copy=False), keys, values)

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
    ) -> Floats:
        inputs = {
            "embeddings": embeddings[None].astype(self._activations, copy=False),
            "latent_positions": latent_positions,
            "question_positions": question_positions,
            "keys": image.keys,
            "values": image.values,
        }
        return self._llm.prefill(inputs, capacity)

    def decode(self, embedding: Floats) -> Floats:
        return self._llm.step(embedding)

    def close(self) -> None:
        del self._vision, self._alignment, self._llm


class _Decoder:
    """The LLM's session with its KV cache: allocated once, bound as input *and* output, so updated in place.

    A sequence uses a prefix of the cache's memory, as much as it may grow to: GroupQueryAttention clears all
    that it is given, and memory that is never given is never touched, so it takes no room.
    """

    def __init__(self, session: ort.InferenceSession, bundle: Bundle, device: str = "cpu") -> None:
        manifest = bundle.manifest
        self._device = device
        config, activations = manifest.model, np.dtype(manifest.activations)
        language, context = config.language, config.alignment.window_size**2
        self._session = session
        self._prefill_options = _run_options(device)
        self._capacity = 0
        self._specs = graphs.cache_specs(config, manifest.cache)
        memory = self._specs if device == "cpu" else []
        self._memory = {spec.name: np.zeros(_size(spec, manifest.max_context), spec.dtype) for spec in memory}
        self._cache: dict[str, ort.OrtValue] = {}
        self._last_position = np.zeros(1, np.int32)
        self._total_length = np.zeros((), np.int32)
        self._logits: Floats = np.zeros((1, language.vocab_size), np.float32)
        self._step_embedding = np.zeros((1, 1, language.hidden_size), activations)
        empty = np.zeros((config.alignment.layers, 0, context, language.hidden_size), activations)
        self._step_inputs = {
            "embeddings": self._step_embedding,
            "latent_positions": np.zeros((0, 0), np.int64),
            "question_positions": np.zeros(0, np.int64),
            "keys": empty,
            "values": empty,
        }
        self._is_prefill = np.zeros((), np.bool_)
        self._lengths: dict[str, npt.NDArray[Any]] = {
            "last_position": self._last_position,
            "total_length": self._total_length,
        }
        if any(spec.name == "is_prefill" for spec in session.get_inputs()):
            self._lengths["is_prefill"] = self._is_prefill
        self._step: ort.IOBinding | None = None

    def prefill(self, inputs: dict[str, npt.NDArray[Any]], capacity: int) -> Floats:
        """Start a sequence that may grow to ``capacity`` positions."""
        self._capacity = capacity
        self._is_prefill[...] = True
        self._advance(0, inputs["embeddings"].shape[1])
        with _explained(graphs.LLM):
            self._cache = {}  # a device's old cache is freed before the new one is allocated
            self._cache = self._sequence_cache()
            self._step = self._binding(self._step_inputs) if self._device == "cpu" else None
            self._session.run_with_iobinding(self._binding(inputs), self._prefill_options)
        logits: Floats = self._logits[0]
        return logits

    def step(self, embedding: Floats) -> Floats:
        """Append one token."""
        self._step_embedding[0, 0] = embedding
        self._is_prefill[...] = False
        self._advance(int(self._total_length), 1)
        # Binding copies inputs to another device, so there they are bound anew; the CPU sees them change.
        with _explained(graphs.LLM):
            self._session.run_with_iobinding(self._step or self._binding(self._step_inputs))
        logits: Floats = self._logits[0]
        return logits

    def _advance(self, start: int, count: int) -> None:
        if start + count > self._capacity:
            raise FusionError(
                f"The sequence has {start + count} positions, more than the {self._capacity} that it was started "
                "with; start it with a larger capacity."
            )
        self._total_length[...] = start + count
        self._last_position[...] = start + count - 1

    def _sequence_cache(self) -> dict[str, ort.OrtValue]:
        """By name, the cache of a sequence: on the CPU a part of the memory, elsewhere allocated for it."""
        values = {}
        for spec in self._specs:
            shape = _shape(spec, self._capacity)
            if self._device == "cpu":
                values[spec.name] = _value(self._memory[spec.name][: math.prod(shape)].reshape(shape))
            else:
                values[spec.name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, spec.dtype, self._device, 0)
        return values

    def _binding(self, inputs: dict[str, npt.NDArray[Any]]) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, array in [*inputs.items(), *self._lengths.items()]:
            binding.bind_ortvalue_input(name, _value(array))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_ortvalue_output("logits", _value(self._logits))
        return binding


def _shape(spec: graphs.TensorSpec, capacity: int) -> tuple[int, ...]:
    return tuple(capacity if isinstance(size, str) else size for size in spec.shape)


def _size(spec: graphs.TensorSpec, capacity: int) -> int:
    return math.prod(_shape(spec, capacity))


def _value(array: npt.NDArray[Any]) -> ort.OrtValue:
    """The array itself as ONNX Runtime's CPU provider sees it: no copy, so later writes to it are seen too."""
    return ort.OrtValue.ortvalue_from_numpy(array)


@contextmanager
def _explained(graph: str) -> Iterator[None]:
    """ONNX Runtime's own errors as one of ours."""
    try:
        yield
    except Exception as error:  # a dozen unrelated types
        raise FusionError(
            f"ONNX Runtime failed while running {graph}: {_reason(error)} If memory ran out, ask with a smaller "
            "--query-len, or export with fewer --image-tokens, a smaller --max-context or --kv-cache int8; "
            "otherwise check the bundle with fusion-info."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, as a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".: ") + "."


def _session_options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # ONNX Runtime's own default counts what it takes for physical cores and finds one on virtual machines.
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))  # Linux, as every target is
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # CPUs without VNNI overflow in products of unsigned and signed bytes (w8a8); this makes both unsigned there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _run_options(device: str) -> ort.RunOptions:
    """Of a large run: its memory is given back to the system afterwards.

    ONNX Runtime would keep it for the next run; three graphs would hold the room of their largest runs at once
    (measured: 0.3 GB of the LLM's after a prompt of 900 at 3B, at no cost in time). Freeing a GPU's would stall it.
    """
    options = ort.RunOptions()
    if device == "cpu":
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _session(bundle: Bundle, name: str, device: str, options: ort.SessionOptions) -> ort.InferenceSession:
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise FusionError(
            f"ONNX Runtime's {provider} is not installed; install onnxruntime-gpu, or run a bundle that was "
            "exported for the CPU (fusion-export --target cpu)."
        )
    path, _ = bundle.path(graph_file(name)), bundle.path(data_file(name))
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        remedy = "Upgrade onnxruntime"
        if bundle.manifest.cache == "int8":
            remedy += ", or export with --kv-cache float: older releases know no int8 KV cache"
        raise FusionError(f"ONNX Runtime {ort.__version__} cannot load {path}: {_reason(error)} {remedy}.") from error
    if provider not in session.get_providers():
        raise FusionError(
            f"ONNX Runtime could not start its {provider} on this machine; check the driver, or run a bundle that was "
            "exported for the CPU (fusion-export --target cpu)."
        )
    return session
