"""Run the graphs of a TensorRT bundle, whole or in partitions, on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import ModelProto

from fusion_edge.runtime.bundle.reader import Bundle

Arrays = dict[str, npt.NDArray[Any]]
CAPACITY, LENGTH = 32, 16
"""Tokens of the KV cache and of the prompt."""


def graph_of(bundle: Bundle, name: str) -> ModelProto:
    """Return a graph of a bundle, without its weights."""
    return onnx.load(bundle.folder / f"{name}.onnx", load_external_data=False)


def inputs_of(bundle: Bundle, name: str) -> Arrays:
    """Return random inputs of a graph. All rows of the LLM's prompt are latents, in reverse order."""
    generator, hidden = np.random.default_rng(0), bundle.manifest.model.language.hidden_size
    sizes = {"crops": 2, "text": 3, "side": 2, "latent_rows": 3, "context_side": 6, "context_rows": 2}
    sizes |= {"positions": LENGTH, "questions": 1, "latents": LENGTH, "capacity": CAPACITY, "slots": CAPACITY}
    places = {
        "positions": np.arange(LENGTH)[None],
        "latent_positions": np.arange(LENGTH)[None, ::-1].copy(),
        "question_positions": np.array([LENGTH - 1]),
        "write_index": np.array([0]),
        "slots": np.arange(CAPACITY),
        "text_mask": np.ones((2, 3), np.int32),
        "latent_cells": generator.integers(0, 4, (2, 3)),
        "context_cells": generator.integers(0, 4, (6, 2)),
    }
    shapes = {
        value.name: [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]
        for value in graph_of(bundle, name).graph.input
    }
    assert hidden in shapes[next(iter(shapes.keys() & {"embeddings", "text_embeds", "features"}))]
    random = {other: generator.normal(0, 0.5, shape).astype(np.float16) for other, shape in shapes.items()}
    return {key: places.get(key, random[key]) for key in shapes}


def computed(
    folder: Path, models: Iterable[ModelProto], given: Mapping[str, npt.NDArray[Any]], is_optimized: bool = True
) -> Arrays:
    """Run partitions in order, with the data files in ``folder``; return their outputs."""
    values = dict(given)
    options = ort.SessionOptions()
    if not is_optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    for model in models:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_outputs()]
        feeds = {one.name: values[one.name] for one in session.get_inputs()}
        values |= dict(zip(names, session.run(names, feeds), strict=True))
    return {name: value for name, value in values.items() if name not in given}
