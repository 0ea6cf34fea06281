"""The TensorRT backend, also for TensorRT-RTX: memory is allocated once, and a CUDA graph runs decode steps."""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.base import (
    Floats,
    ImageAlignment,
    Integers,
    KvPrefix,
    check_capacity,
    check_rewind,
)
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.graph import EngineGraph
from fusion_edge.runtime.backends.tensorrt.kernel_cache import KernelCache
from fusion_edge.runtime.backends.tensorrt.kv_cache import InPlaceCache, KvCache, QuantizedKvCache
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages
from fusion_edge.runtime.backends.tensorrt.memory import DeviceMemory, DeviceTensor, KvPrefixes
from fusion_edge.runtime.backends.tensorrt.memory_estimate import check_device_memory
from fusion_edge.runtime.backends.tensorrt.self_test import check_decode, check_prefix
from fusion_edge.runtime.bundle.engine_manifest import Engine, EnginePlatform, Engines
from fusion_edge.runtime.bundle.engines import engines_folder, open_engines
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER
from fusion_edge.runtime.bundle.manifest import Manifest
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.jetson import this_jetson

ONLY_PROFILE = 0
"""Profile of the vision encoder and of the alignment decoder."""
IMAGE_TENSORS: tuple[str, ...] = ("keys", "values")
"""Outputs of the alignment decoder that stay on the device for the LLM."""
CACHE_PREFIXES = ("present.", "slots.", "prefix.", "new.")
"""Starts of names of tensors that get no memory of their own.

``present.`` lies in the memory of ``past.``, the others in that of :class:`QuantizedKvCache`.
"""
HOST_TENSORS = {
    *("pixel_values", "text_embeds", "text_mask", "features", "latent_cells", "context_cells", "latents"),
    *("embeddings", "latent_positions", "question_positions", "positions", "write_index", "slots", "prefix", "logits"),
}
"""Tensors that the host reads or writes."""


class TensorRTBackend:
    """Implements :class:`fusion_edge.runtime.backends.base.Backend`."""

    def __init__(self, bundle: Bundle, library: Library, cuda: Cuda, built: tuple[Path, Engines] | None = None) -> None:
        """Load the engines for this machine, or those just ``built``: their folder and manifest.

        Raises :class:`FusionError` if the bundle has none for it, or the device has too little memory.
        """
        self.name = library.name.replace("_", "-")
        platform = EnginePlatform(library.name, library.version, cuda.compute_capability())
        folder, engines = open_engines(bundle, platform) if built is None else built
        check_device_memory(bundle.manifest, engines, cuda)
        _note_other_device(engines)
        self._config, self.max_context = bundle.manifest.model, engines.max_context
        messages = Messages(library)
        self._logger = messages.logger()  # must outlive every user of it
        self._runtime = library.module.Runtime(self._logger)
        self._cuda, self._stream = cuda, cuda.stream()
        self._memory = DeviceMemory(cuda)
        self._graphs: dict[str, EngineGraph] = {}
        self._free_pairs: list[tuple[DeviceTensor, ...]] = []
        self._prefix_length = self._length = self._capacity = 0
        self._decode_graphs: list[Any] = []
        self._kernels = KernelCache(library.module, engines_folder(bundle, platform).name) if library.is_rtx else None
        self._is_loaded = self._is_interrupted = False
        try:
            for name, parts in engines.engines.items():
                self._graphs[name] = EngineGraph(name, parts, folder, library, self._runtime, messages)
            self._tensors = self._allocate([engine for parts in engines.engines.values() for engine in parts])
            self._cache = self._kv_cache(bundle.manifest)
            self._step_shapes = self._decode_step_shapes()
            self._prefixes = KvPrefixes(self._memory, self._cache.parts)
            self._prepare()
            self._prompts = engines.prompt_lengths
            self._windows = engines.decode_windows
            for name in ("slots", "prefix"):
                if (tensor := self._tensors.get(name)) is not None:
                    tensor.upload(np.arange(tensor.shape[0]), self._stream)
            self._capture_decode_steps()
            self._check_decode(engines)
            self._is_loaded = True
            self._keep_kernels()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # frees the contexts before the engines
            self.close()  # frees memory for another device
            raise

    def _allocate(self, engines: list[Engine]) -> dict[str, DeviceTensor]:
        """Allocate the largest shape of each tensor, by name, except those of :class:`QuantizedKvCache`."""
        tensors: dict[str, DeviceTensor] = {}
        for engine in engines:
            largest = engine.largest_shapes
            for tensor in engine.tensors:
                name = tensor["name"]
                shape = largest[name]
                if name in IMAGE_TENSORS:
                    self._image_tensor = tensor["dtype"], shape
                elif name not in tensors and not name.startswith(CACHE_PREFIXES):
                    tensors[name] = DeviceTensor(self._memory, tensor["dtype"], shape, name in HOST_TENSORS)
        return tensors

    def _kv_cache(self, manifest: Manifest) -> KvCache:
        """Return the KV cache, in memory of its own or in that of the engines' tensors."""
        if not manifest.has_per_token_scales:
            return InPlaceCache(self._tensors, self.max_context)
        return QuantizedKvCache(self._memory, manifest.cache_specs, self._tensors["slots"].shape[0])

    def _prepare(self) -> None:
        """Create the contexts. They share their scratch memory, because one runs at a time."""
        size = max(graph.scratch_bytes for graph in self._graphs.values())
        scratch = self._memory.device(size)
        self._empty = dict.fromkeys(IMAGE_TENSORS, self._memory.device(0))
        pointers = {name: tensor.pointer for name, tensor in self._tensors.items()} | self._empty
        pointers |= self._cache.pointers
        for graph in self._graphs.values():
            graph.prepare(scratch, size, pointers, self._stream, self._kernels)
        self._cuda.wait(self._stream)

    # Vision and alignment ----------------------------------------------------------------------------------------

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Floats:
        inputs = {"pixel_values": pixels, "text_embeds": text_embeds, "text_mask": text_mask}
        self._run(VISION_ENCODER, inputs, {"crops": len(pixels), "text": text_embeds.shape[1]})
        shape = (len(pixels), self._config.vision.patches, self._config.language.hidden_size)
        return self._result("features", shape).astype(np.float32)

    def align(self, features: npt.ArrayLike, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        count = len(latent_cells) ** 2
        pair = self._image_memory()
        pointers = {name: tensor.pointer for name, tensor in zip(IMAGE_TENSORS, pair, strict=True)}
        inputs = {"features": np.asarray(features), "latent_cells": latent_cells, "context_cells": context_cells}
        cells = (*latent_cells.shape, *context_cells.shape)
        dimensions = dict(zip(("side", "latent_rows", "context_side", "context_rows"), cells, strict=True))
        try:
            self._graphs[ALIGNMENT_DECODER].bind(ONLY_PROFILE, pointers)
            self._run(ALIGNMENT_DECODER, inputs, dimensions | {"latents": count})
            latents = self._result("latents", (1, count, self._config.language.hidden_size))[0].astype(np.float32)
        except BaseException:  # such as an interrupt
            self._free_pairs.append(pair)
            raise
        aligned = ImageAlignment(latents, *pair)
        weakref.finalize(aligned, self._free_pairs.append, pair)
        return aligned

    def read_alignment(self, image: ImageAlignment) -> tuple[Floats, ...]:
        """Return an image's keys and values ``[layers,q,9,D]`` on the host."""
        alignment, width = self._config.alignment, self._config.language.hidden_size
        shape = alignment.layers, len(image.latents), alignment.window_size**2, width
        return tuple(tensor.read(shape, self._stream).astype(np.float32) for tensor in (image.keys, image.values))

    def _image_memory(self) -> tuple[DeviceTensor, ...]:
        """Return memory for the keys and values of an image, freed by an earlier image or new."""
        if self._free_pairs:
            return self._free_pairs.pop()
        dtype, shape = self._image_tensor
        return tuple(DeviceTensor(self._memory, dtype, shape, on_host=False) for _ in IMAGE_TENSORS)

    # LLM ---------------------------------------------------------------------------------------------------------

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
        prefix: KvPrefix | None = None,
    ) -> Floats:
        if capacity > self.max_context:
            raise FusionError(
                f"A sequence of {capacity} tokens exceeds the engines' context of {self.max_context}; build with a "
                "larger --max-context."
            )
        start = 0 if prefix is None else prefix.length
        check_capacity(start + len(embeddings), capacity)
        pointers = {"keys": image.keys.pointer, "values": image.values.pointer}
        self._run_prompt(embeddings, pointers, latent_positions, question_positions, prefix)
        self._prefix_length, self._length, self._capacity = start, start + len(embeddings), capacity
        logits: Floats = self._result("logits", (1, self._config.language.vocab_size))[0]
        return logits

    def prefill_prefix(self, embeddings: Floats) -> KvPrefix:
        self._prefix_length = self._length = self._capacity = 0
        self._run_prompt(embeddings, self._empty, np.zeros((0, 0), np.int64), np.zeros(0, np.int64))
        prefix = self._prefixes.keep(len(embeddings), self._stream)
        self._cuda.wait(self._stream)
        return prefix

    def _run_prompt(
        self,
        embeddings: Floats,
        image: dict[str, int],
        latent_positions: Integers,
        question_positions: Integers,
        prefix: KvPrefix | None = None,
    ) -> None:
        """Enqueue a run of the LLM over several tokens, which follow ``prefix``, with keys and values at ``image``."""
        start = 0 if prefix is None else prefix.length
        inputs: dict[str, npt.NDArray[Any]] = {
            "embeddings": embeddings[None],
            "latent_positions": latent_positions,
            "question_positions": question_positions,
            "positions": np.arange(start, start + len(embeddings))[None],
            **self._cache.prompt_inputs(start),
        }
        questions, latents = latent_positions.shape
        dimensions = {"positions": len(embeddings), "questions": questions, "latents": latents}
        dimensions |= self._cache.prompt_sizes(start, len(embeddings))
        profile = self._prompt_profile(len(embeddings))
        self._graphs[LLM].set_dimensions(profile, dimensions)
        self._graphs[LLM].bind(profile, image | self._cache.start(start, self._tensors["slots"], self._stream))
        self._prefixes.restore(prefix, self._stream)
        self._enqueue(LLM, profile, inputs)

    def _prompt_profile(self, length: int) -> int:
        """Return the profile for a prompt of ``length`` tokens: the first that has it, or the last, which says so."""
        fits = (number for number, (least, most) in enumerate(self._prompts) if least <= length <= most)
        return next(fits, len(self._prompts) - 1)

    def decode(self, embedding: Floats) -> Floats:
        check_capacity(self._length + 1, self._capacity)
        self._check_interrupted()
        needed = self._cache.window(self._length)
        number = next(number for number, window in enumerate(self._windows) if window >= needed)
        return self._decode(embedding, number)

    def _decode(self, embedding: Floats, number: int) -> Floats:
        """Run a decode step with a window of the cache, and return its logits."""
        self._write_decode_step(embedding, self._length)
        if self._decode_graphs[number] is None:
            self._decode_step(number)
        else:
            self._cuda.launch(self._decode_graphs[number], self._stream)
        self._cache.store(self._length, self._stream)
        self._cuda.wait(self._stream)
        self._length += 1
        logits: Floats = self._tensors["logits"].host((1, self._config.language.vocab_size))[0]
        return logits

    def rewind(self, length: int) -> None:
        check_rewind(length, self._prefix_length, self._length)
        self._length = length

    def _write_decode_step(self, embedding: npt.ArrayLike, position: int) -> None:
        """Write the inputs of a decode step to pinned memory."""
        values = {"embeddings": embedding} | dict.fromkeys(self._cache.step_inputs, position)
        for name, value in values.items():
            self._tensors[name].host(self._step_shapes[name])[...] = value

    def _decode_step_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a decode step's inputs from the host, by name."""
        shapes = {"embeddings": (1, 1, self._config.language.hidden_size), "positions": (1, 1), "write_index": (1,)}
        return {name: shapes[name] for name in ("embeddings", *self._cache.step_inputs)}

    def _decode_step(self, number: int) -> None:
        """Enqueue a decode step with a window of the cache, from pinned memory to pinned memory."""
        for name, shape in self._step_shapes.items():
            self._tensors[name].send(shape, self._stream)
        self._graphs[LLM].run(len(self._prompts) + number, self._stream)
        self._tensors["logits"].download((1, self._config.language.vocab_size), self._stream)

    def _capture_decode_steps(self) -> None:
        """Capture a decode step per window as a CUDA graph: one launch instead of hundreds.

        Steps of a window whose capture fails run without one.
        """
        refusals = []
        for number, window in enumerate(self._windows):
            dimensions = {"positions": 1, "questions": 0, "latents": 0, "slots": window, **self._cache.step_sizes}
            self._graphs[LLM].set_dimensions(len(self._prompts) + number, dimensions)
            self._write_decode_step(0, 0)
            self._decode_step(number)  # a first run does work that cannot be captured
            self._cuda.wait(self._stream)
            captured = None
            try:
                captured = self._captured_decode_step(number)
            except FusionError as error:
                refusals.append(error)
            self._decode_graphs.append(captured)  # close() frees it, also if the next window fails
        if refusals:
            sys.stderr.write(f"warning: decode steps run without a CUDA graph: {refusals[0]}\n")

    def _captured_decode_step(self, number: int) -> Any:
        """Return a decode step as a CUDA graph. Raises :class:`FusionError` if TensorRT or CUDA refuses."""
        self._cuda.begin_capture(self._stream)
        try:
            self._decode_step(number)
        except BaseException:  # such as an interrupt
            with suppress(DeviceError):
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))  # of an incomplete step
            raise
        return self._cuda.end_capture(self._stream)

    def _check_decode(self, engines: Engines) -> None:
        """Raise :class:`FusionError` unless decode steps continue prompts, in every profile and behind a prefix."""
        pair, width = self._image_memory(), self._config.language.hidden_size

        def prefill(prompt: Floats, latents: range, capacity: int, prefix: KvPrefix | None = None) -> Floats:
            positions = np.array(latents)
            image = ImageAlignment(prompt[positions], *pair)
            return self.prefill(prompt, image, positions[None], positions[-1:] + 2, capacity, prefix)

        check_decode(engines, width, prefill, self._decode)
        check_prefix(engines, width, prefill, self.prefill_prefix, self.decode)
        self._free_pairs.append(pair)
        self._prefix_length = self._length = self._capacity = 0

    def _keep_kernels(self) -> None:
        if self._kernels is not None and self._is_loaded:
            self._kernels.save()

    # Runs, results and close ---------------------------------------------------------------------------------------

    def _run(self, graph: str, inputs: Mapping[str, npt.NDArray[Any]], dimensions: Mapping[str, int]) -> None:
        self._check_interrupted()
        self._graphs[graph].set_dimensions(ONLY_PROFILE, dimensions)
        self._enqueue(graph, ONLY_PROFILE, inputs)

    def _enqueue(self, graph: str, profile: int, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        for name, array in inputs.items():
            self._tensors[name].upload(array, self._stream)
        self._graphs[graph].run(profile, self._stream, self._between_partitions)

    def _between_partitions(self) -> None:
        """Wait for a partition. Raise :class:`FusionError` after :meth:`interrupt`: nothing stops a running engine."""
        self._cuda.wait(self._stream)
        self._check_interrupted()

    def _check_interrupted(self) -> None:
        if self._is_interrupted:
            raise FusionError("The run was interrupted; ask the question again.")

    def interrupt(self) -> None:
        self._is_interrupted = True

    def resume(self) -> None:
        self._is_interrupted = False

    def _result(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return an output on the host. The next run overwrites it."""
        result = self._tensors[name].download(shape, self._stream)
        self._cuda.wait(self._stream)
        return result

    def close(self) -> None:
        self._keep_kernels()
        for captured in self._decode_graphs:
            if captured is not None:
                self._cuda.destroy_graph(captured)
        for graph in self._graphs.values():
            graph.free_contexts()
        if self._kernels is not None:
            self._kernels.close()
        for graph in self._graphs.values():
            graph.close()
        self._memory.close()
        self._cuda.destroy_stream(self._stream)


def _note_other_device(engines: Engines) -> None:
    """Say that kernels were timed on another Jetson of this compute capability. They run here, too."""
    here = this_jetson()
    if here is not None and engines.timed_on not in (None, here.model):
        sys.stderr.write(
            f"note: kernels were timed on {engines.timed_on}, not on this {here.model}; fusion-build --force times "
            "them here\n"
        )
