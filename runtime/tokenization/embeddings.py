"""Token embeddings, read from a memory-mapped table."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.bundle.manifest import EMBEDDINGS
from fusion_edge.runtime.bundle.reader import Bundle
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.resources import is_out_of_memory, not_enough_memory

ZERO_POINT = 128  # of int8 tables, as in quant/packing.py


class Embeddings:
    """LLM input embeddings by token id."""

    def __init__(self, bundle: Bundle) -> None:
        """Map ``embeddings.data``. Raise :class:`FusionError` if there is not enough memory."""
        language = bundle.manifest.model.language
        self._columns = language.hidden_size
        path = bundle.path(EMBEDDINGS)
        try:
            self._values, *scales = (
                np.memmap(path, part.dtype, "r", part.offset, part.shape)
                for part in bundle.manifest.embedding.parts(language.vocab_size, language.hidden_size)
            )
        except (OSError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = not_enough_memory(f"map {path}", bundle.manifest.size)
            raise FusionError(f"{problem}; close other programs, or export a smaller bundle.") from None
        self._scales = scales[0] if scales else None

    def __call__(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return float32 ``[n,D]`` for ids ``[n]``. Raise :class:`FusionError` for an id outside the vocabulary."""
        if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < len(self._values):
            raise FusionError(
                f"The tokenizer gives ids up to {token_ids.max()} and the token table has {len(self._values)} rows; "
                "they do not belong together: export the bundle again."
            )
        rows: npt.NDArray[np.float32] = self._values[token_ids].astype(np.float32)
        if self._scales is None:
            return rows
        rows -= ZERO_POINT
        rows *= self._scales[token_ids].astype(np.float32)[..., None]
        return rows.reshape(len(rows), math.prod(rows.shape[1:]))[:, : self._columns]
