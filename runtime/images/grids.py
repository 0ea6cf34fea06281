"""Pooling and resizing of square feature maps (docs/fusion-model.md sections 2 and 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fusion_edge.runtime.bundle.config import side as side_of


def pooling_cells(size: int, cells: int) -> npt.NDArray[np.int64]:
    """Return the rows that each cell of an adaptive pool covers: int64 ``[cells,m]``.

    Cell i covers floor(i*size/cells) to ceil((i+1)*size/cells), exclusive (docs/fusion-model.md section 3).
    Shorter cells repeat their last index, which does not change a maximum: ``rows[pooling_cells(...)].max(axis=1)`` is
    adaptive max pooling along one axis. Raises ``ValueError`` unless both numbers are positive.
    """
    if size < 1 or cells < 1:
        raise ValueError(f"cannot pool {size} rows into {cells} cells")
    cell = np.arange(cells, dtype=np.int64)
    first = cell * size // cells
    last = -(-(cell + 1) * size // cells) - 1
    offsets = np.arange((last - first).max() + 1, dtype=np.int64)
    indices: npt.NDArray[np.int64] = np.minimum(first[:, None] + offsets, last[:, None])
    return indices


def alignment_cells(
    size: int, query_length: int, window_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the pooling cells of the latents and of their context windows, for a square map of side ``size``."""
    cells = side_of(query_length)
    return pooling_cells(size, cells), pooling_cells(size, cells * window_size)


def resize_grid(features: npt.NDArray[np.float32], side: int) -> npt.NDArray[np.float32]:
    """Resize a square map ``[P,D]`` bilinearly to ``[side*side,D]`` (FUSION-L, docs/fusion-model.md section 2).

    Half-pixel centers, no antialiasing. The same side returns ``features`` itself. Raises ``ValueError`` if P is not a
    square number or ``side`` is not positive.
    """
    if side < 1:
        raise ValueError(f"cannot resize a map to a side of {side}")
    old_side = side_of(len(features))
    if side == old_side:
        return features
    weights = _bilinear_weights(old_side, side)
    rows = weights @ features.reshape(old_side, -1)  # mixes whole rows of the map
    resized: npt.NDArray[np.float32] = np.matmul(weights, rows.reshape(side, old_side, -1))
    return resized.reshape(side * side, -1)


def _bilinear_weights(size: int, new_size: int) -> npt.NDArray[np.float32]:
    """Return weights ``[new_size,size]``: each row has the one or two weights of an output sample."""
    source = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    weights: npt.NDArray[np.float64] = np.maximum(1 - np.abs(source[:, None] - np.arange(size)), 0)
    return weights.astype(np.float32)
