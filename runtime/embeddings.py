"""The token table: mapped into memory, a row read when its token occurs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.bundle import EMBEDDINGS, Bundle
from fusion_edge.runtime.errors import FusionError

ZERO_POINT = 128  # of int8 tables (quant/packing.py)
FLOATS = {"fp16": "float16", "fp32": "float32"}


class Embeddings:
    """LLM input embeddings by token id."""

    def __init__(self, bundle: Bundle) -> None:
        """Maps ``embeddings.data``; reads no row yet. Raises :class:`FusionError` if the table is not in it."""
        language, table = bundle.manifest.model.language, bundle.manifest.embedding
        rows, columns = language.vocab_size, language.hidden_size
        path = bundle.path(EMBEDDINGS)
        self._columns = columns
        self._scales: npt.NDArray[np.float16] | None = None
        if table.group_size == 0 and table.kind in FLOATS:
            self._values = _map(path, FLOATS[table.kind], table.values_offset, (rows, columns))
        elif table.group_size > 0 and table.kind == "int8":
            groups = -(-columns // table.group_size)
            self._values = _map(path, "uint8", table.values_offset, (rows, groups, table.group_size))
            self._scales = _map(path, "float16", table.scales_offset, (rows, groups))
        else:
            raise FusionError(
                f"The bundle's embedding table is of the unknown kind {table.kind!r} with groups of "
                f"{table.group_size}; export the bundle again."
            )

    def __call__(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """``[n]`` -> float32 ``[n, hidden_size]``. Raises :class:`FusionError` for an id outside the vocabulary."""
        try:
            rows = self._values[token_ids].astype(np.float32)
        except IndexError:
            raise FusionError(
                f"The tokenizer gives the token id {token_ids.max()}, the bundle's token table has {len(self._values)} "
                "rows; export again from a checkpoint whose tokenizer and weights belong together."
            ) from None
        if self._scales is None:
            return rows
        rows -= ZERO_POINT
        rows *= self._scales[token_ids].astype(np.float32)[..., None]
        return rows.reshape(len(rows), -1)[:, : self._columns]


def _map(path: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except (OverflowError, ValueError) as error:
        raise FusionError(
            f"{path} does not hold {shape} values of {dtype} at byte {offset}; export the bundle again."
        ) from error


