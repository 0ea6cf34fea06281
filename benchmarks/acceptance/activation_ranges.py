"""Export a bundle whose vision encoder computes in integers (``w8a8``), without torch and without samples.

The ranges of the activations are those of one picture and one question, in the same encoder with float16 activations
on ONNX Runtime. That suffices to build engines and compare them; a calibration with samples chooses better ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fusion_edge.export.bundle.weight_source import RoundToNearest
from fusion_edge.export.bundle.writer import write_bundle
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.quant.formats import SYMMETRIC_ZERO_POINT, ActivationQuantization
from fusion_edge.runtime.backends.onnxruntime.library import find_onnxruntime
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS
from fusion_edge.runtime.bundle.graphs import VISION_ENCODER
from fusion_edge.runtime.bundle.manifest import graph_file
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.bundle.templates import TEMPLATES
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image, normalize
from fusion_edge.runtime.prompts.prompt import encode_prompt
from fusion_edge.runtime.tokenization.embeddings import Embeddings
from fusion_edge.runtime.tokenization.tokenizer import load_tokenizer

LARGEST_CODE = 127
SMALLEST_SCALE = 2.0**-14
"""Smallest normal float16: of activations that are all 0."""


def export_with_ranges(checkpoint: Path, output: Path, largest: Mapping[str, float]) -> None:
    """Export a checkpoint for TensorRT in INT4, its vision encoder in ``w8a8``.

    ``largest`` are the largest magnitudes of activations by name of their linear. Raises :class:`FusionError`.
    """
    with Checkpoint(checkpoint) as opened:
        plan = plan_export(opened, ExportOptions(target="tensorrt", vision="int8", is_calibrated=True))
        write_bundle(plan, output, False, _WithRanges(CheckpointWeights(opened, plan.parameters), largest))


class _WithRanges(RoundToNearest):
    """Weights of a checkpoint, rounded to nearest, and activations with given ranges."""

    def __init__(self, weights: CheckpointWeights, largest: Mapping[str, float]) -> None:
        super().__init__(weights)
        self._largest = largest

    def activation_quantization(self, linear: Linear) -> ActivationQuantization:
        """Return the quantization that covers the range."""
        scale = max(self._largest[linear.name] / LARGEST_CODE, SMALLEST_SCALE)
        return ActivationQuantization(float(np.float16(scale)), SYMMETRIC_ZERO_POINT)


def largest_inputs(bundle: Bundle, picture: Path, question: str) -> dict[str, float]:
    """Return the largest magnitude that each linear of the vision encoder reads, by name.

    ``bundle`` is for TensorRT, with float16 weights in the encoder. Requires ONNX Runtime with opset 24.
    """
    model = onnx.load(bundle.path(graph_file(VISION_ENCODER)))
    read = {
        name: node.input[0]
        for node in model.graph.node
        if (name := node.name.removesuffix(".MatMul")) in bundle.manifest.weights
    }
    given = {value.name for value in model.graph.input}
    computed = sorted(set(read.values()) - given)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    session = find_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys([*given, *computed], 0.0)
    for inputs in _runs(bundle, picture, question):
        values = inputs | dict(zip(computed, session.run(computed, inputs), strict=True))
        largest |= {name: max(largest[name], _largest(values[name])) for name in largest}
    return {linear: largest[value] for linear, value in read.items()}


def _largest(values: npt.NDArray[Any]) -> float:
    return float(np.abs(values).max(initial=0))


def _runs(bundle: Bundle, picture: Path, question: str) -> list[dict[str, npt.NDArray[Any]]]:
    """Return the encoder's inputs for the global crops, and for the local crop under the question."""
    manifest = bundle.manifest
    ids = encode_prompt(load_tokenizer(bundle), TEMPLATES[manifest.model.template], (), question).instruct_ids
    text, pixels = Embeddings(bundle)(ids)[None], normalize(cut_crops(load_image(picture)))
    no_text = np.zeros((GLOBAL_CROPS, 0, text.shape[2]))
    runs = (pixels[:GLOBAL_CROPS], no_text), (pixels[GLOBAL_CROPS:], text)
    return [
        {
            "pixel_values": crops.astype(np.float16),
            "text_embeds": rows.astype(np.float16),
            "text_mask": np.ones(rows.shape[:2], np.int32),
        }
        for crops, rows in runs
    ]
