"""Find the weights that a checkpoint stores quantized, choose their layout in a bundle, and read their rows."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from fusion_edge.export.checkpoint.prequantized.layout import QuantizedRows, RowReader, StoredLayout
from fusion_edge.export.checkpoint.prequantized.quantization_config import read_layout
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.tensor_mapping import Parameter, Source
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import Packed, by_block, dequantize, pack, pack_codes
from fusion_edge.runtime.errors import FusionError

_CACHED_WEIGHTS = 3  # a parameter has at most three sources, and neighboring blocks of rows share them


def with_prequantized_sources(checkpoint: Checkpoint, mapping: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return ``mapping`` with :attr:`Source.prequantized` set where the checkpoint stores a linear's weight quantized.

    Raises as :func:`read_layout`.
    """
    layout = read_layout(checkpoint)
    if layout is None:
        return dict(mapping)

    def found(source: Source) -> Source:
        if len(source.shape) != 2:
            return source
        return dataclasses.replace(source, prequantized=layout.find(source.tensor, source.shape, checkpoint))

    return {
        name: dataclasses.replace(p, sources=tuple(map(found, p.sources))) if p.kind == "linear" else p
        for name, p in mapping.items()
    }


def stored_layout(parameter: Parameter, checkpoint: Checkpoint) -> StoredLayout:
    """Return the layout in which a bundle stores a prequantized parameter.

    Raises :class:`FusionError` if its sources differ in layout, or if its columns split a source's groups.
    """
    layouts = [_source_layout(parameter, source, checkpoint) for source in parameter.sources]
    # A symmetric source fits an asymmetric layout: its zero points are all in the middle.
    kinds = {layout.format.kind.removeprefix("u") for layout in layouts}
    others = {(layout.format.group_size, layout.scale_dtype, layout.columns) for layout in layouts}
    if len(kinds) > 1 or len(others) > 1:
        raise _cannot_merge(parameter, "differ in bits, groups, type of scales, or order of columns")
    asymmetric = [layout for layout in layouts if not layout.format.is_symmetric]
    return asymmetric[0] if asymmetric else layouts[0]


def check_scales(parameter: Parameter, checkpoint: Checkpoint, dtype: str) -> None:
    """Raise :class:`FusionError` if a scale of a prequantized parameter is not a positive number in ``dtype``.

    ``dtype`` is the NumPy name of the graphs' float type, to which scales are cast.
    """
    for source in parameter.sources:
        assert source.prequantized is not None
        scales = source.prequantized.scales(checkpoint)
        with np.errstate(over="ignore"):
            cast = scales.values.astype(dtype)
        is_valid = np.isfinite(cast) & ((cast >= 0) if scales.may_be_zero else (cast > 0))
        if not is_valid.all():
            raise FusionError(
                f"Tensor {scales.tensor} of {checkpoint.folder} holds the scale {scales.values[~is_valid][0]:g}; "
                f"expected positive numbers in the range of {dtype}. Download or quantize the checkpoint again, or "
                f"requantize this weight with --rule '{parameter.linear}=int4'."
            )


def _source_layout(parameter: Parameter, source: Source, checkpoint: Checkpoint) -> StoredLayout:
    if source.prequantized is None:
        raise _cannot_merge(parameter, "are only partly quantized")
    layout = source.prequantized.stored_layout(checkpoint)
    if source.column_range is None:
        return layout
    if layout.columns is not None or any(column % layout.format.group_size for column in source.column_range):
        first, last = source.column_range
        raise FusionError(
            f"{parameter.name} is columns {first} to {last} of {source.tensor}, and splits its groups of "
            f"{layout.format.group_size} quantized columns{', which are reordered' if layout.columns else ''}. "
            f"{_remedy(parameter)}"
        )
    return layout


def _cannot_merge(parameter: Parameter, how: str) -> FusionError:
    names = ", ".join(source.tensor for source in parameter.sources)
    return FusionError(f"The tensors {names} form one matmul, {parameter.name}, but they {how}. {_remedy(parameter)}")


def _remedy(parameter: Parameter) -> str:
    return f"Requantize it with --rule '{parameter.linear}=int4'."


class PrequantizedReader:
    """Reads rows of prequantized weights. Thread-safe.

    The last few weights stay in memory, packed: some layouts store rows as columns, so reading a few needs the whole.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._opened: OrderedDict[str, tuple[StoredLayout, RowReader]] = OrderedDict()
        self._lock = Lock()

    def packed(self, sources: Iterable[tuple[Source, int, int]], fmt: WeightFormat) -> Packed:
        """Return rows of sources, concatenated, as a bundle stores them. No integer is changed.

        Each source comes with its first and last row (exclusive). Raises :class:`FusionError` for scales that are not
        finite.
        """
        parts = []
        for source, start, stop in sources:
            layout, rows = self._read(source, start, stop)
            rows = _select_columns(rows, source.column_range, layout.format.group_size)
            parts.append(_divide_groups(rows, layout.format.group_size, fmt.group_size))
        return _pack(parts, fmt)

    def values(self, source: Source, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return dequantized rows of a source, float32 ``[stop-start, K]``. Raises as :meth:`packed`."""
        layout, rows = self._read(source, start, stop)
        values = dequantize(_pack([rows], layout.format), layout.format, rows.values.shape[1])
        if layout.columns is not None:
            values[:, layout.columns] = values.copy()
        return values if source.column_range is None else values[:, slice(*source.column_range)]

    def _read(self, source: Source, start: int, stop: int) -> tuple[StoredLayout, QuantizedRows]:
        tensor = source.prequantized
        assert tensor is not None
        with self._lock:
            opened = self._opened.pop(source.tensor, None)
            if opened is None:
                opened = tensor.stored_layout(self._checkpoint), tensor.open(self._checkpoint)
            self._opened[source.tensor] = opened
            if len(self._opened) > _CACHED_WEIGHTS:
                self._opened.popitem(last=False)
        layout, read = opened
        rows = read(source.first_row + start, source.first_row + stop)
        if not np.isfinite(rows.scales.sum(dtype=np.float64)):
            raise FusionError(
                f"The scales of {source.tensor} in {self._checkpoint.folder} are NaN or infinite: the checkpoint is "
                "damaged. Download or quantize it again."
            )
        return layout, rows


def _select_columns(rows: QuantizedRows, columns: tuple[int, int] | None, group: int) -> QuantizedRows:
    """Return a range of columns that starts and ends with groups. None: all columns."""
    if columns is None:
        return rows
    groups = slice(columns[0] // group, columns[1] // group)
    zero_points = None if rows.zero_points is None else rows.zero_points[:, groups]
    return QuantizedRows(rows.values[:, slice(*columns)], rows.scales[:, groups], zero_points)


def _divide_groups(rows: QuantizedRows, group: int, smaller: int) -> QuantizedRows:
    """Return rows in groups of ``smaller`` columns instead of ``group``, with repeated scales."""
    inputs = rows.values.shape[1]
    zero_points = None if rows.zero_points is None else by_block(rows.zero_points, group, inputs, smaller)
    return QuantizedRows(rows.values, by_block(rows.scales, group, inputs, smaller), zero_points)


def _pack(parts: Sequence[QuantizedRows], fmt: WeightFormat) -> Packed:
    """Concatenate rows and pack them as a bundle stores them."""
    values, scales = np.concatenate([p.values for p in parts]), np.concatenate([p.scales for p in parts])
    if fmt.has_codebook:
        return Packed(pack(values.reshape(*scales.shape, -1), fmt), scales)
    return pack_codes(values, scales, np.concatenate([p.zero_points for p in parts if p.zero_points is not None]), fmt)
