"""Which formats of weights TensorRT has products for."""

from __future__ import annotations

from collections.abc import Mapping

from fusion_edge.export.packed.layout import Form
from fusion_edge.export.tensor_names import Parameter
from fusion_edge.quant.formats import PER_CHANNEL, WeightFormat
from fusion_edge.quant.policy import EMBEDDING
from fusion_edge.runtime.errors import UsageError


def check_formats(
    formats: Mapping[str, WeightFormat], parameters: Mapping[str, Parameter], packed: Mapping[str, Form]
) -> None:
    """Raise :class:`UsageError` for a linear in a format that TensorRT does not read, with one that it does.

    It reads symmetric integers: INT4 in whole blocks along the inputs, two outputs to a byte, with float16 scales; INT8
    with one scale a channel.
    """
    for name, form in formats.items():
        if name == EMBEDDING:
            continue
        reason = _unreadable(form, parameters[f"{name}.weight"].shape, packed.get(name))
        if reason is not None:
            raise UsageError(
                f"{name} cannot be {form} for TensorRT: {reason}, or use another format "
                f"(--rule '{name}=int8:channel')."
            )


def _unreadable(form: WeightFormat, shape: tuple[int, ...], packed: Form | None) -> str | None:
    if form.has_codebook:
        return "it has no products with a codebook; use --int4"
    if not form.is_symmetric:
        return "it knows no zero points; leave --asym out"
    if packed is not None and packed.scale_dtype != "float16":
        return f"its scales are {packed.scale_dtype}, not float16; quantize it anew"
    if form.kind == "int8" and form.group_size != PER_CHANNEL:
        return "its 8-bit weights have one scale a channel; write int8:channel"
    if form.kind == "int4":
        outputs, inputs = shape
        if inputs % form.block_size:
            return f"its {inputs} inputs are not whole groups of {form.block_size}; use a smaller --group-size"
        if outputs % 2:
            return f"its {outputs} outputs are odd, and two share a byte; give it 8 bits"
    return None
