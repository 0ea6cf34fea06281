"""TensorRT and TensorRT-RTX: engines that ``fusion-build`` made, all memory allocated once, steps as a CUDA graph."""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.backends.base import Floats, ImageAlignment, Integers, check_capacity
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.graph import EngineGraph
from fusion_edge.runtime.backends.tensorrt.kernel_cache import KernelCache
from fusion_edge.runtime.backends.tensorrt.library import Library, Messages
from fusion_edge.runtime.backends.tensorrt.memory import DeviceMemory, DeviceTensor
from fusion_edge.runtime.backends.tensorrt.memory_estimate import check_device_memory
from fusion_edge.runtime.bundle.engine_manifest import Engine, EnginePlatform, Engines
from fusion_edge.runtime.bundle.engines import open_engines
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import DeviceError, FusionError

PROMPT, STEP = 0, 1
"""The LLM's profiles."""
OF_IMAGE = ("keys", "values")
"""What the alignment decoder leaves on the device for the LLM."""
ON_HOST = {
    *("pixel_values", "text_embeds", "text_mask", "features", "latent_cells", "context_cells", "latents"),
    *("embeddings", "latent_positions", "question_positions", "positions", "write_index", "logits"),
}
"""What the host gives or reads."""
LARGEST_DIFFERENCE = 0.2
"""Between a step's logits and a prompt's, in standard deviations: float16 in other kernels makes a tenth of it."""
STEP_INPUTS = ("embeddings", "positions", "write_index")


class TensorRTBackend:
    """See :class:`fusion_edge.runtime.backends.base.Backend`."""

    def __init__(self, bundle: Bundle, library: Library, cuda: Cuda) -> None:
        """Load the engines of this machine.

        Raises :class:`FusionError` if there are none that fit it, or the device has too little memory for them.
        """
        self.name = library.name.replace("_", "-")
        folder, engines = open_engines(bundle, EnginePlatform(library.name, library.version, cuda.compute_capability()))
        check_device_memory(bundle.manifest, engines, cuda)
        self._config, self.max_context = bundle.manifest.model, engines.max_context
        messages = Messages(library)
        self._logger = messages.logger()  # outlives what logs
        self._runtime = library.module.Runtime(self._logger)
        self._cuda, self._stream = cuda, cuda.stream()
        self._memory = DeviceMemory(cuda)
        self._graphs: dict[str, EngineGraph] = {}
        self._free: list[tuple[DeviceTensor, ...]] = []
        self._length = self._capacity = 0
        self._recorded: Any = None
        self._kernels = KernelCache(library.module, folder.name) if library.is_rtx else None
        self._is_loaded = False
        try:
            for name, parts in engines.engines.items():
                self._graphs[name] = EngineGraph(name, parts, folder, library, self._runtime, messages)
            self._tensors = self._allocate([engine for parts in engines.engines.values() for engine in parts])
            self._prepare()
            self._recorded = self._record_step()
            self._check_steps(engines)
            self._is_loaded = True
            self._keep_kernels()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # contexts, which must go before what they were made with
            self.close()  # another device may run the bundle, and a Jetson's memory is the machine's
            raise

    def _allocate(self, engines: list[Engine]) -> dict[str, DeviceTensor]:
        """Memory by name of a tensor, for its largest shape. A cache comes in and goes out in the same."""
        tensors: dict[str, DeviceTensor] = {}
        for engine in engines:
            largest = engine.largest_shapes
            for tensor in engine.tensors:
                name = tensor["name"]
                shape = largest[name]
                if name in OF_IMAGE:
                    self._of_image = tensor["dtype"], shape
                elif name.startswith("present."):
                    tensors[name] = tensors[f"past.{name.removeprefix('present.')}"]
                elif name not in tensors:
                    tensors[name] = DeviceTensor(self._memory, tensor["dtype"], shape, name in ON_HOST)
        return tensors

    def _prepare(self) -> None:
        """Contexts, all of which work in the same scratch memory: one runs at a time."""
        size = max(graph.scratch_bytes for graph in self._graphs.values())
        scratch = self._memory.device(size)
        nothing = self._memory.device(0)
        pointers = {name: tensor.pointer for name, tensor in self._tensors.items()} | dict.fromkeys(OF_IMAGE, nothing)
        for graph in self._graphs.values():
            graph.prepare(scratch, size, pointers, self._stream, self._kernels)
        self._cuda.wait(self._stream)

    # Vision and alignment ----------------------------------------------------------------------------------------

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> Floats:
        inputs = {"pixel_values": pixels, "text_embeds": text_embeds, "text_mask": text_mask}
        self._run(VISION_ENCODER, PROMPT, inputs, {"crops": len(pixels), "text": text_embeds.shape[1]})
        shape = (len(pixels), self._config.vision.patches, self._config.language.hidden_size)
        return self._result("features", shape).astype(np.float32)

    def align(self, features: npt.ArrayLike, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        count = len(latent_cells) ** 2
        pair = self._image_memory()
        pointers = {name: tensor.pointer for name, tensor in zip(OF_IMAGE, pair, strict=True)}
        self._graphs[ALIGNMENT_DECODER].bind(PROMPT, pointers)
        inputs = {"features": np.asarray(features), "latent_cells": latent_cells, "context_cells": context_cells}
        cells = (*latent_cells.shape, *context_cells.shape)
        dimensions = dict(zip(("side", "latent_rows", "context_side", "context_rows"), cells, strict=True))
        self._run(ALIGNMENT_DECODER, PROMPT, inputs, dimensions | {"latents": count})
        latents = self._result("latents", (1, count, self._config.language.hidden_size))[0].astype(np.float32)
        aligned = ImageAlignment(latents, *pair)
        weakref.finalize(aligned, self._free.append, pair)
        return aligned

    def _image_memory(self) -> tuple[DeviceTensor, ...]:
        """Keys and values of one image: memory of one that is no longer kept, or new."""
        if self._free:
            return self._free.pop()
        dtype, shape = self._of_image
        return tuple(DeviceTensor(self._memory, dtype, shape, on_host=False) for _ in OF_IMAGE)

    # LLM ---------------------------------------------------------------------------------------------------------

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
    ) -> Floats:
        if capacity > self.max_context:
            raise FusionError(
                f"A sequence of {capacity} positions does not fit the engines' context of {self.max_context}; build "
                "with a larger --max-context."
            )
        check_capacity(len(embeddings), capacity)
        self._graphs[LLM].bind(PROMPT, {"keys": image.keys.pointer, "values": image.values.pointer})
        inputs: dict[str, npt.NDArray[Any]] = {
            "embeddings": embeddings[None],
            "latent_positions": latent_positions,
            "question_positions": question_positions,
            "positions": np.arange(len(embeddings))[None],
            "write_index": np.zeros(1, np.int64),
        }
        questions, latents = latent_positions.shape
        dimensions = {"positions": len(embeddings), "questions": questions, "latents": latents}
        self._run(LLM, PROMPT, inputs, dimensions)
        self._length, self._capacity = len(embeddings), capacity
        logits: Floats = self._result("logits", (1, self._config.language.vocab_size))[0]
        return logits

    def decode(self, embedding: Floats) -> Floats:
        check_capacity(self._length + 1, self._capacity)
        self._write_step(embedding, self._length)
        if self._recorded is None:
            self._step()
        else:
            self._cuda.launch(self._recorded, self._stream)
        self._cuda.wait(self._stream)
        self._length += 1
        logits: Floats = self._tensors["logits"].host((1, self._config.language.vocab_size))[0]
        return logits

    def _write_step(self, embedding: npt.ArrayLike, position: int) -> None:
        """The inputs of a step, in pinned memory."""
        values = dict(zip(STEP_INPUTS, (embedding, position, position), strict=True))
        for name, value in values.items():
            self._tensors[name].host(self._step_shapes[name])[...] = value

    @property
    def _step_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"embeddings": (1, 1, self._config.language.hidden_size), "positions": (1, 1), "write_index": (1,)}

    def _step(self) -> None:
        """One token, from pinned memory to pinned memory: all work of a step is in the stream."""
        for name, shape in self._step_shapes.items():
            self._tensors[name].send(shape, self._stream)
        self._graphs[LLM].run(STEP, self._stream)
        self._tensors["logits"].download((1, self._config.language.vocab_size), self._stream)

    def _record_step(self) -> Any:
        """A step as a CUDA graph, one launch where there were hundreds; None where TensorRT cannot be recorded."""
        self._graphs[LLM].set_dimensions(STEP, {"positions": 1, "questions": 0, "latents": 0})
        self._write_step(0, 0)
        self._step()  # what TensorRT does in a first run cannot be recorded
        self._cuda.wait(self._stream)
        self._cuda.begin_capture(self._stream)
        refusal: FusionError | None = None
        try:
            self._step()
        except FusionError as error:
            refusal = error
        try:
            recorded = self._cuda.end_capture(self._stream)
        except DeviceError as error:
            recorded, refusal = None, refusal or error
        if refusal is None:
            return recorded
        sys.stderr.write(f"Steps run without a CUDA graph: {refusal}\n")
        if recorded is not None:  # a part of a step
            self._cuda.destroy_graph(recorded)
        return None

    def _check_steps(self, engines: Engines) -> None:
        """A step behind a prompt must give what the longer prompt gives: so it is if caches are updated in place.

        TensorRT promises that of TensorScatter alone; before it had that (10.15) what is done with input and output in
        the same memory is up to it. Raises :class:`FusionError` if the answers would be wrong.
        """
        latents = engines.engines[LLM][0].profiles[PROMPT]["latents"][0]
        rows = np.random.default_rng(0).normal(0, 1, (latents + 3, self._config.language.hidden_size))
        prompt: Floats = rows.astype(np.float32)
        pair = self._image_memory()
        image, places, last = ImageAlignment(prompt[:latents], *pair), np.arange(latents)[None], np.array([latents + 1])
        self.prefill(prompt[:-1], image, places, last, len(prompt))
        stepped = self.decode(prompt[-1]).copy()
        expected = self.prefill(prompt, image, places, last, len(prompt))
        self._free.append(pair)
        self._length = self._capacity = 0
        if not np.abs(stepped - expected).max() <= LARGEST_DIFFERENCE * expected.std():
            raise FusionError(
                f"{engines.machine} computes steps that contradict its prompts, so its answers would be wrong; run the "
                "bundle with --device cpu, or with another TensorRT, and report this."
            )

    def _keep_kernels(self) -> None:
        if self._kernels is not None and self._is_loaded:
            self._kernels.save()

    # What all graphs share ---------------------------------------------------------------------------------------

    def _run(
        self, graph: str, profile: int, inputs: Mapping[str, npt.NDArray[Any]], dimensions: Mapping[str, int]
    ) -> None:
        self._graphs[graph].set_dimensions(profile, dimensions)
        for name, array in inputs.items():
            self._tensors[name].upload(array, self._stream)
        self._graphs[graph].run(profile, self._stream)

    def _result(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """An output on the host, in memory that the next run overwrites."""
        result = self._tensors[name].download(shape, self._stream)
        self._cuda.wait(self._stream)
        return result

    def close(self) -> None:
        self._keep_kernels()
        if self._recorded is not None:
            self._cuda.destroy_graph(self._recorded)
        for graph in self._graphs.values():
            graph.free_contexts()
        if self._kernels is not None:
            self._kernels.close()
        for graph in self._graphs.values():
            graph.close()
        self._memory.close()
        self._cuda.destroy_stream(self._stream)
