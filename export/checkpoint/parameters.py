"""Match a checkpoint's tensors to the parameters of the model."""

from __future__ import annotations

import numpy as np

from fusion_edge.export.checkpoint.prequantized.layout import ExpectedTensor
from fusion_edge.export.checkpoint.prequantized_weights import with_prequantized_sources
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import POSITION_IDS, ROTARY_BUFFER, UNUSED, Parameter, parameters
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.errors import FusionError


def match_parameters(checkpoint: Checkpoint, config: FusionConfig) -> dict[str, Parameter]:
    """Return the parameters of ``config`` by name, after checking their tensors in the checkpoint.

    Raises :class:`FusionError` naming a tensor that is missing, unused, or has a wrong shape or type, or a quantization
    that is not supported.
    """
    matched = with_prequantized_sources(checkpoint, parameters(config))
    sources = [source for parameter in matched.values() for source in parameter.sources]
    expected: dict[str, ExpectedTensor] = {}
    for source in sources:
        stored = source.prequantized
        expected |= {source.tensor: ExpectedTensor(source.shape)} if stored is None else stored.tensors
    for name, needed in expected.items():
        _check_tensor(checkpoint, name, needed)
    weights = {source.tensor for source in sources}
    for name in sorted(checkpoint.tensors.keys() - expected.keys() - set(UNUSED)):
        _check_unused(checkpoint, name, config, weights)
    return matched


def _check_tensor(checkpoint: Checkpoint, name: str, expected: ExpectedTensor) -> None:
    """Raise :class:`FusionError` if a tensor is missing or has a wrong shape or type."""
    if name not in checkpoint.tensors:
        other = next((other for other in checkpoint.tensors if other.endswith(f".{name}")), None)
        raise FusionError(
            f"Tensor {name} is missing from {checkpoint.folder}{f', but there is {other}' if other else ''}; expected "
            f"shape {list(expected.shape)}. Download or save the checkpoint again."
        )
    found = checkpoint.tensors[name]
    if found.shape != expected.shape:
        raise FusionError(
            f"Tensor {name} of {checkpoint.folder} has shape {list(found.shape)}; config.json requires "
            f"{list(expected.shape)}. Take config and weights from the same checkpoint."
        )
    if found.dtype not in expected.dtypes:
        raise FusionError(
            f"Tensor {name} of {checkpoint.folder} has the type {found.dtype}; expected "
            f"{' or '.join(expected.dtypes)}. Use the released bfloat16 checkpoint, or convert the tensor."
        )


def _check_unused(checkpoint: Checkpoint, name: str, config: FusionConfig, weights: set[str]) -> None:
    """Raise :class:`FusionError` if a tensor that the model does not read would change its answers.

    Allowed are rotary and position buffers of older releases, and biases of zeros that quantization tools save.
    """
    if ROTARY_BUFFER.fullmatch(name):
        return
    if name == POSITION_IDS:
        _check_position_ids(checkpoint, config.vision.patches)
    elif name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in weights:
        _check_zero_bias(checkpoint, name)
    else:
        raise FusionError(
            f"Tensor {name} of {checkpoint.folder} is not part of a FUSION model and would be ignored: remove it, or "
            "export the checkpoint that it belongs to."
        )


def _check_position_ids(checkpoint: Checkpoint, patches: int) -> None:
    shape = checkpoint.tensors[POSITION_IDS].shape
    if shape not in ((1, patches), (patches,)) or (checkpoint.read_stored(POSITION_IDS) != np.arange(patches)).any():
        raise FusionError(
            f"Tensor {POSITION_IDS} of {checkpoint.folder} is not 0 to {patches - 1} in order, which is not supported: "
            "download or save the checkpoint again."
        )


def _check_zero_bias(checkpoint: Checkpoint, bias: str) -> None:
    if len(checkpoint.tensors[bias].shape) > 1 or checkpoint.read_stored(bias).any():
        raise FusionError(
            f"Tensor {bias} of {checkpoint.folder} is a bias that is not 0, but this linear of a FUSION model has no "
            "bias. Export the checkpoint that it was quantized or converted from."
        )
