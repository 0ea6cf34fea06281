"""Perplexity of a text through a bundle's LLM graph.

The graph returns logits of the last token only. One node is changed to pass all tokens on, so one run over a window
returns all of its logits. All other nodes and all weights are the bundle's. The accuracy level of quantized GEMMs can
be set, to measure the loss from quantized activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from fusion_edge.runtime.bundle import graphs
from fusion_edge.runtime.bundle.manifest import data_file, graph_file
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.tokenization.embeddings import Embeddings

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

ROWS_AT_ONCE = 128  # rows of float64 logits in memory


class TextModel:
    """LLM of a bundle, on text without an image. Delete it to free its memory."""

    def __init__(self, folder: Path, threads: int, accuracy_level: int) -> None:
        """``accuracy_level`` replaces that of every quantized GEMM in the bundle."""
        bundle = open_bundle(folder)
        manifest = bundle.manifest
        self._embeddings = Embeddings(bundle)
        self._cache, self._has_per_token_scales = manifest.cache_specs, manifest.has_per_token_scales
        alignment, hidden = manifest.model.alignment, manifest.model.language.hidden_size
        context = np.zeros((alignment.layers, 0, alignment.window_size**2, hidden), np.float32)
        self._activations = manifest.activations
        self._no_image = {
            "latent_positions": np.zeros((0, 0), np.int64),
            "question_positions": np.zeros(0, np.int64),
            "keys": context.astype(self._activations),
            "values": context.astype(self._activations),
        }
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        weights = bundle.path(data_file(graphs.LLM))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.parent))
        model = onnx.load(bundle.path(graph_file(graphs.LLM)), load_external_data=False)
        give_all_rows(model)
        set_accuracy_level(model, accuracy_level)
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def logits(self, tokens: Integers) -> Floats:
        """Return logits ``[L,V]`` of a window ``[L]`` that starts at position 0."""
        length = len(tokens)
        inputs = {
            **self._no_image,
            "embeddings": self._embeddings(tokens)[None].astype(self._activations),
            "last_position": np.array([length - 1], np.int32),
            "total_length": np.array(length, np.int32),
            "positions": np.arange(length)[None],  # TensorRT bundles only, as the two below
            "write_index": np.zeros(1, np.int64),
            "slots": np.arange(0 if self._has_per_token_scales else length),
            "prefix": np.zeros(0, np.int64),
        }
        for spec in self._cache:
            past = 0 if self._has_per_token_scales else length
            zeros = np.zeros([past if isinstance(size, str) else size for size in spec.shape], spec.dtype)
            inputs |= {f"{way}.{spec.name}": zeros for way in ("past", "slots", "prefix")}
        known = {one.name for one in self._session.get_inputs()}
        outputs: Any = self._session.run(["logits"], {name: inputs[name] for name in known})
        rows: Floats = outputs[0][0]
        return rows


def give_all_rows(model: onnx.ModelProto) -> None:
    """Change an LLM graph to return logits ``[1,L,V]`` of every token."""
    graph = model.graph
    norm = next(node for node in graph.node if node.output[0].startswith("llm.norm."))
    last_row = next(node for node in graph.node if norm.input[0] in node.output)
    assert last_row.op_type == "Gather", last_row.op_type
    del last_row.input[1:], last_row.attribute[:]
    last_row.op_type = "Identity"
    logits = next(output for output in graph.output if output.name == "logits")
    size = logits.type.tensor_type.shape.dim[-1].dim_value
    logits.CopyFrom(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, "positions", size]))


def set_accuracy_level(model: onnx.ModelProto, level: int) -> None:
    """Set the accuracy level of every quantized GEMM: float (0) or int8 activations (4)."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level


def negative_log_likelihood(logits: Floats, tokens: Integers) -> float:
    """Return the summed ``-log p`` in nats of the tokens ``[L]`` after the first, from a window's logits ``[L,V]``."""
    total = 0.0
    for start in range(0, len(tokens) - 1, ROWS_AT_ONCE):
        following = tokens[1 + start : 1 + start + ROWS_AT_ONCE]
        rows = logits[start : start + len(following)].astype(np.float64)
        largest = rows.max(1)
        log_sum = largest + np.log(np.exp(rows - largest[:, None]).sum(1))
        total += float((log_sum - rows[np.arange(len(following)), following]).sum())
    return total


def perplexity(model: TextModel, prompt: Integers, windows: Iterable[Integers]) -> float:
    """Return the perplexity of all tokens of all windows, each after the prompt and the preceding tokens."""
    total, count = 0.0, 0
    for window in windows:
        tokens = np.concatenate([prompt, window])
        first = len(prompt) - 1  # row with the logits of the window's first token
        total += negative_log_likelihood(model.logits(tokens)[first:], tokens[first:])
        count += len(window)
    return math.exp(total / count)
