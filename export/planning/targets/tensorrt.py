"""TensorRT, and the weight formats of its GEMMs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from fusion_edge.export.checkpoint.prequantized.layout import StoredLayout
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.tensorrt import TensorRTOperations
from fusion_edge.export.planning.targets.target import Target
from fusion_edge.quant.formats import NVFP4_BLOCK, PER_CHANNEL, WeightFormat
from fusion_edge.runtime.backends.tensorrt import memory_estimate
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import FusionError, UsageError

BLOCK_SIZES = (64, 128)
"""Block sizes of INT4 weights (NVIDIA's documentation of TensorRT, "Quantization Schemes")."""


class TensorRTTarget(Target):
    """TensorRT reads symmetric integers only.

    INT4 comes in whole blocks of :data:`BLOCK_SIZES` along the inputs, two outputs per byte, with float16 scales. INT8
    has one scale per output channel. TensorRT documents INT4 as its only format of weights with float activations, so
    no other one is a default.
    """

    def lm_head_format(self, shape: tuple[int, ...], group_size: int | None, is_small: bool) -> WeightFormat:
        """Return float16; if ``is_small``, INT4 in the blocks of the other weights, or in those that fit its inputs."""
        if not is_small:
            return WeightFormat("fp16")
        sizes = [WeightFormat.grouped("int4", group_size).block_size, *BLOCK_SIZES]
        fitting = [WeightFormat("int4", size) for size in sizes if _int4_obstacle(shape, size) is None]
        return next(iter(fitting), WeightFormat("fp16"))

    def stored_layout(self, layout: StoredLayout, inputs: int) -> StoredLayout:
        """Split groups larger than a block into blocks, each with the group's scale."""
        fitting = [size for size in BLOCK_SIZES if inputs % size == 0]
        if layout.format.kind != "int4" or layout.format.group_size <= BLOCK_SIZES[-1] or not fitting:
            return layout
        return dataclasses.replace(layout, format=WeightFormat("int4", fitting[-1]))

    def check_formats(self, linears: Mapping[str, Linear]) -> None:
        for name, linear in linears.items():
            reason = None if linear.is_table else _unreadable(linear)
            if reason is not None:
                raise UsageError(
                    f"{name} cannot be {linear.format} for TensorRT: {reason}, or use another format "
                    f"(--rule '{name}=fp16')."
                )

    def activation_bytes(self, config: FusionConfig, max_context: int, graph_elements: Sequence[int]) -> int:
        return memory_estimate.activation_bytes(config, max_context)


TENSORRT = TensorRTTarget(
    name="tensorrt",
    lowering=TensorRTOperations,
    activations="float16",
    accuracy_levels=(0,),
    kv_caches=("float", "int8"),
    float_kinds=("fp8", "nvfp4"),
    symmetric_activations=True,
    int8_per_channel=True,
    default_vision="fp16",
    context_bytes=memory_estimate.RUNTIME_BYTES,
)


READS_WINDOWS = re.compile(r"alignment\.layers\.\d+\.(context|key|value)")
"""Linears whose inputs have four dimensions. TensorRT's quantization to FP4 takes two or three."""
FORMATS_SINCE = {"fp8": "8.9", "nvfp4": "10.0"}
"""Oldest compute capability by format."""


def check_capability(bundle: Bundle, compute_capability: str) -> None:
    """Raise :class:`FusionError` if a bundle has a format that the device does not multiply."""
    for name, fmt in bundle.manifest.weights.items():
        if fmt in FORMATS_SINCE and _numbers(compute_capability) < _numbers(FORMATS_SINCE[fmt]):
            raise FusionError(
                f"{bundle.folder} has {name} in {fmt}, which compute capability {compute_capability} does not have "
                f"({FORMATS_SINCE[fmt]} and later do); export it with another format, --rule '{name}=fp16'."
            )


def _numbers(compute_capability: str) -> tuple[int, ...]:
    return tuple(map(int, compute_capability.split(".")))


def _unreadable(linear: Linear) -> str | None:
    """Return why TensorRT does not support a linear's format, with a remedy; None if it does."""
    fmt = linear.format
    if fmt.has_codebook:
        return "it has no GEMMs with a codebook; use --int4"
    if not fmt.is_symmetric:
        return "it supports no zero points; leave --asym out"
    if linear.prequantized and linear.scale_dtype != "float16":
        return f"its scales are {linear.scale_dtype}, not float16; quantize it anew"
    if fmt.kind == "int8" and fmt.group_size != PER_CHANNEL:
        return "its 8-bit weights have one scale per channel; write int8:channel"
    if fmt.kind == "nvfp4":
        return _unreadable_nvfp4(linear)
    return _unreadable_int4(linear) if fmt.kind == "int4" else None


def _unreadable_nvfp4(linear: Linear) -> str | None:
    if linear.inputs % NVFP4_BLOCK:
        return f"its {linear.inputs} inputs are not whole blocks of {NVFP4_BLOCK}; keep it in float16"
    if READS_WINDOWS.fullmatch(linear.name):
        return "it reads windows of the image, and only matrices are quantized to FP4; use int4"
    return None


def _unreadable_int4(linear: Linear) -> str | None:
    fmt, inputs = linear.format, linear.inputs
    obstacle = _int4_obstacle(linear.weight.shape, fmt.block_size)
    fitting = [size for size in BLOCK_SIZES if inputs % size == 0]
    if obstacle is None or linear.outputs % 2 or not fitting:
        return obstacle
    if linear.prequantized:
        everywhere = re.sub(r"\.\d+\.", ".*.", linear.name)
        return f"{obstacle}; quantize it anew (--rule '{everywhere}=int4:{fitting[-1]}')"
    return f"{obstacle}; use --group-size {' or '.join(map(str, fitting))}, in a rule int4:{fitting[-1]}"


def _int4_obstacle(shape: tuple[int, ...], size: int) -> str | None:
    """Return why a weight ``[outputs, inputs]`` cannot be INT4 in blocks of ``size``; None if it can."""
    outputs, inputs = shape
    if outputs % 2:
        return f"its {outputs} outputs are odd, and two share a byte; keep it in float16"
    if all(inputs % block for block in BLOCK_SIZES):
        return f"its {inputs} inputs are not whole groups of 64 or 128; keep it in float16"
    if size not in BLOCK_SIZES:
        return "it has 4-bit GEMMs only for groups of 64 and 128"
    return f"its {inputs} inputs are not whole groups of {size}" if inputs % size else None
