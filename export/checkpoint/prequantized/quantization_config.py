"""Read a checkpoint's ``quantization_config``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusion_edge.export.checkpoint.json_fields import JsonFields
from fusion_edge.export.checkpoint.prequantized.bitsandbytes import BitsAndBytesLayout
from fusion_edge.export.checkpoint.prequantized.compressed_tensors import CompressedTensorsLayout
from fusion_edge.export.checkpoint.prequantized.gptq import GptqLayout
from fusion_edge.export.checkpoint.prequantized.layout import CheckpointLayout
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.runtime.errors import FusionError

GPTQ_CONFIG = "quantize_config.json"
_QUANTIZED_SUFFIXES = (".qweight", ".weight_packed", ".weight.absmax")  # one for each layout

LAYOUTS: Mapping[str, Callable[[JsonFields], CheckpointLayout]] = {
    "gptq": GptqLayout.read,
    "compressed-tensors": CompressedTensorsLayout.read,
    "bitsandbytes": BitsAndBytesLayout.read,
}
"""Readers of ``quantization_config`` by ``quant_method``."""


def read_layout(checkpoint: Checkpoint) -> CheckpointLayout | None:
    """Return the layout that ``quantization_config`` describes. None if all weights are floats.

    Early AutoGPTQ wrote ``quantize_config.json`` only. Raises :class:`FusionError` naming an unsupported field, or a
    quantized tensor without a config.
    """
    config = JsonFields(checkpoint.folder / "config.json")
    if config.data.get("quantization_config") is None:
        return _read_without_config(checkpoint)
    fields = config.inner("quantization_config")
    return LAYOUTS[fields.one_of("quant_method", tuple(LAYOUTS))](fields)


def _read_without_config(checkpoint: Checkpoint) -> CheckpointLayout | None:
    quantized = next((name for name in checkpoint.tensors if name.endswith(_QUANTIZED_SUFFIXES)), None)
    if quantized is None:
        return None
    path = checkpoint.folder / GPTQ_CONFIG
    if quantized.endswith(".qweight") and path.exists():
        fields = JsonFields(path)
        fields.one_of("quant_method", ("gptq", None))
        return GptqLayout.read(fields)
    raise FusionError(
        f"Tensor {quantized} of {checkpoint.folder} is quantized; expected quantization_config in config.json, or "
        f"{GPTQ_CONFIG}. Add the one that the quantization tool saved."
    )
