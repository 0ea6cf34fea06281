"""Parameters whose sources a quantized checkpoint stores packed: found, given one form, read."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.json_fields import Fields
from fusion_edge.export.checkpoint.prequantized.bitsandbytes import BitsAndBytesLayout
from fusion_edge.export.checkpoint.prequantized.compressed_tensors import CompressedTensorsLayout
from fusion_edge.export.checkpoint.prequantized.gptq import GptqLayout
from fusion_edge.export.checkpoint.prequantized.layout import Codes, PrequantizedTensor, Rows, StoredLayout
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter, Source
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import Packed, by_block, dequantize, pack, pack_codes
from fusion_edge.runtime.errors import FusionError

GPTQ_CONFIG = "quantize_config.json"
_PACKED = (".qweight", ".weight_packed", ".weight.absmax")  # ends of tensors' names, one for each layout
KEPT = 3  # weights in memory, packed as the checkpoint has them: those of one parameter, of neighbouring blocks of rows


class Layout(Protocol):
    """How a checkpoint stores quantized weights."""

    def find(self, tensor: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> PrequantizedTensor | None:
        """What stands for the weight ``tensor`` of ``shape`` ``[N,K]``; None if it is not quantized."""
        ...


LAYOUTS: Mapping[str, Callable[[Fields], Layout]] = {
    "gptq": GptqLayout.read,
    "compressed-tensors": CompressedTensorsLayout.read,
    "bitsandbytes": BitsAndBytesLayout.read,
}
"""Readers of ``quantization_config`` by its ``quant_method``."""


def read_layout(checkpoint: Checkpoint) -> Layout | None:
    """How the checkpoint's ``quantization_config`` says that weights are stored; None if they are floats.

    GPTQ's may be in ``quantize_config.json`` alone, where AutoGPTQ wrote it at first. Raises :class:`FusionError`
    naming a field of it that is not supported, or a quantized weight if there is none.
    """
    config = Fields(checkpoint.folder / "config.json")
    if config.data.get("quantization_config") is None:
        return _read_unnamed_layout(checkpoint)
    fields = config.inner("quantization_config")
    return LAYOUTS[fields.one_of("quant_method", tuple(LAYOUTS))](fields)


def _read_unnamed_layout(checkpoint: Checkpoint) -> Layout | None:
    quantized = next((name for name in checkpoint.tensors if name.endswith(_PACKED)), None)
    if quantized is None:
        return None
    path = checkpoint.folder / GPTQ_CONFIG
    if quantized.endswith(".qweight") and path.exists():
        fields = Fields(path)
        fields.one_of("quant_method", ("gptq", None))
        return GptqLayout.read(fields)
    raise FusionError(
        f"Tensor {quantized} of {checkpoint.folder} is quantized, and neither quantization_config in config.json nor "
        f"{GPTQ_CONFIG} tells how: add what the tool that quantized it has saved there."
    )


def with_prequantized_sources(checkpoint: Checkpoint, table: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """``table`` with :attr:`Source.prequantized` where the checkpoint has a linear's weight quantized.

    Raises as :func:`read_layout`.
    """
    layout = read_layout(checkpoint)
    if layout is None:
        return dict(table)

    def found(source: Source) -> Source:
        if len(source.shape) != 2:
            return source
        return dataclasses.replace(source, prequantized=layout.find(source.tensor, source.shape, checkpoint))

    return {
        name: dataclasses.replace(p, sources=tuple(map(found, p.sources))) if p.kind == "linear" else p
        for name, p in table.items()
    }


def stored_layout(parameter: Parameter, checkpoint: Checkpoint) -> StoredLayout:
    """Return the one layout in which a bundle stores a prequantized parameter.

    Raises :class:`FusionError` if its sources differ in layout, or if its columns cut through a source's groups.
    """
    layouts = [_source_layout(parameter, source, checkpoint) for source in parameter.sources]
    # Zero points that happen to be all in the middle can be stored as such.
    kinds = {layout.format.kind.removeprefix("u") for layout in layouts}
    alike = {(layout.format.group_size, layout.scale_dtype, layout.columns) for layout in layouts}
    if len(kinds) > 1 or len(alike) > 1:
        raise _different(parameter, "differ in bits, groups, type of scales, or order of columns")
    asymmetric = [layout for layout in layouts if not layout.format.is_symmetric]
    return asymmetric[0] if asymmetric else layouts[0]


def check_scales(parameter: Parameter, checkpoint: Checkpoint, dtype: str) -> None:
    """Raise :class:`FusionError` for a scale of a prequantized parameter that is no positive number in ``dtype``.

    ``dtype`` is numpy's name of what the graphs compute with, which scales are cast to.
    """
    for source in parameter.sources:
        assert source.prequantized is not None
        scales = source.prequantized.scales(checkpoint)
        with np.errstate(over="ignore"):
            cast = scales.values.astype(dtype)
        is_right = np.isfinite(cast) & ((cast >= 0) if scales.may_be_zero else (cast > 0))
        if not is_right.all():
            raise FusionError(
                f"{scales.tensor} of {checkpoint.folder} holds the scale {scales.values[~is_right][0]:g}; expected "
                f"positive numbers that {dtype} holds. Fetch or quantize the checkpoint again, or round this weight "
                f"anew with --rule '{parameter.linear}=int4'."
            )


def _source_layout(parameter: Parameter, source: Source, checkpoint: Checkpoint) -> StoredLayout:
    if source.prequantized is None:
        raise _different(parameter, "are quantized in part only")
    form = source.prequantized.stored_layout(checkpoint)
    if source.column_range is None:
        return form
    if form.columns is not None or any(column % form.format.group_size for column in source.column_range):
        first, last = source.column_range
        raise FusionError(
            f"{parameter.name} is columns {first} to {last} of {source.tensor}, and cuts through its groups of "
            f"{form.format.group_size} quantized columns{', which are out of order' if form.columns else ''}. "
            f"{_remedy(parameter)}"
        )
    return form


def _different(parameter: Parameter, how: str) -> FusionError:
    names = ", ".join(source.tensor for source in parameter.sources)
    return FusionError(f"The tensors {names} are one product, {parameter.name}, but {how}. {_remedy(parameter)}")


def _remedy(parameter: Parameter) -> str:
    return f"Have it quantized anew with --rule '{parameter.linear}=int4'."


class PrequantizedReader:
    """Reads packed sources, the last few kept: their rows may be columns of the file. Safe in several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._opened: OrderedDict[str, tuple[StoredLayout, Rows]] = OrderedDict()
        self._lock = Lock()

    def packed(self, sources: Iterable[tuple[Source, int, int]], form: WeightFormat) -> Packed:
        """Rows of sources, below each other, as a bundle stores them: no integer is changed.

        ``sources`` come with their first and last row (exclusive), of those that they give to their parameter. Raises
        :class:`FusionError` for scales that are not finite.
        """
        parts = []
        for source, start, stop in sources:
            own, codes = self._codes(source, start, stop)
            codes = _columns_of(codes, source.column_range, own.format.group_size)
            parts.append(_in_groups(codes, own.format.group_size, form.group_size))
        return _pack(parts, form)

    def values(self, source: Source, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows of a source as numbers, float32 ``[stop-start, K]``, columns in place. Raises as :meth:`packed`."""
        form, codes = self._codes(source, start, stop)
        values = dequantize(_pack([codes], form.format), form.format, codes.values.shape[1])
        if form.columns is not None:
            values[:, form.columns] = values.copy()
        return values if source.column_range is None else values[:, slice(*source.column_range)]

    def _codes(self, source: Source, start: int, stop: int) -> tuple[StoredLayout, Codes]:
        assert source.prequantized is not None
        with self._lock:
            opened = self._opened.pop(source.tensor, None)
            if opened is None:
                opened = source.prequantized.stored_layout(self._checkpoint), source.prequantized.open(self._checkpoint)
            self._opened[source.tensor] = opened
            if len(self._opened) > KEPT:
                self._opened.popitem(last=False)
        form, rows = opened
        codes = rows(source.first_row + start, source.first_row + stop)
        if not np.isfinite(codes.scales.sum(dtype=np.float64)):
            raise FusionError(
                f"The scales of {source.tensor} in {self._checkpoint.folder} are NaN or infinite; the checkpoint is "
                "damaged: fetch or quantize it again."
            )
        return form, codes


def _columns_of(codes: Codes, columns: tuple[int, int] | None, group: int) -> Codes:
    """A range of columns that starts and ends with groups; None: all."""
    if columns is None:
        return codes
    groups = slice(columns[0] // group, columns[1] // group)
    zero_points = None if codes.zero_points is None else codes.zero_points[:, groups]
    return Codes(codes.values[:, slice(*columns)], codes.scales[:, groups], zero_points)


def _in_groups(codes: Codes, group: int, smaller: int) -> Codes:
    """Groups of ``group`` columns divided into ``smaller`` ones, whose scales repeat."""
    inputs = codes.values.shape[1]
    zero_points = None if codes.zero_points is None else by_block(codes.zero_points, group, inputs, smaller)
    return Codes(codes.values, by_block(codes.scales, group, inputs, smaller), zero_points)


def _pack(parts: Sequence[Codes], form: WeightFormat) -> Packed:
    """Rows below each other, as a bundle stores them."""
    values, scales = np.concatenate([p.values for p in parts]), np.concatenate([p.scales for p in parts])
    if form.has_codebook:
        return Packed(pack(values.reshape(*scales.shape, -1), form), scales)
    return pack_codes(values, scales, np.concatenate([p.zero_points for p in parts if p.zero_points is not None]), form)
