"""TensorRT, and the weight formats of its GEMMs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from fusion_edge.export.checkpoint.prequantized.layout import StoredLayout
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.lowering.tensorrt import TensorRTOperations
from fusion_edge.export.planning.targets.target import Target
from fusion_edge.quant.formats import PER_CHANNEL, STORED_GROUP_SIZES, WeightFormat
from fusion_edge.runtime.backends.tensorrt import memory_estimate
from fusion_edge.runtime.bundle.config import FusionConfig
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import FusionError, UsageError

BLOCK_SIZES = (64, 128)
"""Block sizes of INT4 weights (NVIDIA's documentation of TensorRT, "Quantization Schemes")."""


class TensorRTTarget(Target):
    """TensorRT reads symmetric integers only.

    INT4 comes in whole blocks of :data:`BLOCK_SIZES` along the inputs, two outputs per byte, with float16 scales. INT8
    has one scale per output channel.
    """

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
                    f"(--rule '{name}=int8:channel')."
                )

    def activation_bytes(self, config: FusionConfig, max_context: int, graph_elements: Sequence[int]) -> int:
        return memory_estimate.activation_bytes(config, max_context)


TENSORRT = TensorRTTarget(
    name="tensorrt",
    lowering=TensorRTOperations,
    activations="float16",
    accuracy_levels=(0,),
    symmetric_activations=True,
    int8_per_channel=True,
    context_bytes=memory_estimate.RUNTIME_BYTES,
)


def check_bundle(bundle: Bundle) -> None:
    """Raise :class:`FusionError` for INT4 blocks that TensorRT does not support, as in bundles of older versions."""
    for name, text in bundle.manifest.weights.items():
        fmt = WeightFormat.parse(text, sizes=STORED_GROUP_SIZES)
        if fmt.kind == "int4" and fmt.block_size not in BLOCK_SIZES:
            raise FusionError(
                f"{bundle.folder} has {name} in {fmt}; TensorRT has 4-bit GEMMs only for groups of 64 and 128: "
                f"export it again, fusion-export {bundle.manifest.source} -o FOLDER --target tensorrt --group-size 128 "
                "(or 64)."
            )


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
    return _unreadable_int4(linear) if fmt.kind == "int4" else None


def _unreadable_int4(linear: Linear) -> str | None:
    fmt, outputs, inputs = linear.format, linear.outputs, linear.inputs
    if outputs % 2:
        return f"its {outputs} outputs are odd, and two share a byte; give it 8 bits"
    fitting = [size for size in BLOCK_SIZES if inputs % size == 0]
    if not fitting:
        return f"its {inputs} inputs are not whole groups of 64 or 128; give it 8 bits"
    if fmt.block_size in fitting:
        return None
    if linear.prequantized:
        everywhere = re.sub(r"\.\d+\.", ".*.", linear.name)
        remedy = f"quantize it anew (--rule '{everywhere}=int4:{fitting[-1]}')"
    else:
        remedy = f"use --group-size {' or '.join(map(str, fitting))}, in a rule int4:{fitting[-1]}"
    if fmt.block_size in BLOCK_SIZES:
        return f"its {inputs} inputs are not whole groups of {fmt.block_size}; {remedy}"
    return f"it has 4-bit GEMMs only for groups of 64 and 128; {remedy}"
