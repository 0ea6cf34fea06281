"""Pooling and resizing of feature maps, compared with torch and the golden features."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import GOLDEN

from fusion_edge.runtime.bundle.config import side
from fusion_edge.runtime.images.grids import pooling_cells, resize_grid

TURNS = [
    ("phi_one_turn", 0),
    ("phi_two_turns", 0),
    ("phi_two_turns", 1),
    ("phi_grid12", 0),
    ("llama_one_turn", 0),
]


@settings(deadline=None)
@given(size=st.integers(1, 80), cells=st.integers(1, 80))
def test_cells_equal_those_of_adaptive_pooling(size: int, cells: int) -> None:
    indices = pooling_cells(size, cells)
    assert indices.dtype == np.int64
    expected = [range(i * size // cells, ((i + 1) * size + cells - 1) // cells) for i in range(cells)]
    assert indices.shape == (cells, max(len(cell) for cell in expected))
    for row, cell in zip(indices.tolist(), expected, strict=True):
        assert row == [*cell] + [cell[-1]] * (len(row) - len(cell))


@settings(deadline=None)
@given(size=st.integers(1, 30), cells=st.integers(1, 40))
def test_maximum_over_cells_is_torchs_adaptive_max_pool(size: int, cells: int) -> None:
    torch = pytest.importorskip("torch")
    features = np.random.default_rng(size).standard_normal((size, size, 2)).astype(np.float32)
    indices = pooling_cells(size, cells)
    pooled = features[indices].max(axis=1)[:, indices].max(axis=2)
    expected = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(features).permute(2, 0, 1), cells)
    np.testing.assert_array_equal(pooled, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("case", "turn"), TURNS)
def test_golden_context_pools_to_golden_latents(case: str, turn: int) -> None:
    # A latent's cell is the union of its window's cells: floor(3i * N / 3s) = floor(i * N / s).
    golden = np.load(GOLDEN / f"{case}.npz")
    context, latents = golden[f"t{turn}_global_ctx"], golden[f"t{turn}_latents"]
    context_side, latent_side = side(len(context)), side(len(latents))
    assert context_side == 3 * latent_side
    indices = pooling_cells(context_side, latent_side)
    pooled = context.reshape(context_side, context_side, -1)[indices].max(axis=1)[:, indices].max(axis=2)
    np.testing.assert_array_equal(pooled.reshape(latents.shape), latents)


@pytest.mark.parametrize(("case", "turn"), TURNS)
def test_no_golden_feature_exceeds_its_context_cells(case: str, turn: int) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    features, context = golden["global_features"], golden[f"t{turn}_global_ctx"]
    map_side, context_side = side(9 * len(features)), side(len(context))
    indices = pooling_cells(map_side, context_side)
    compared = 0
    for row in range(len(features)):
        y, x = divmod(9 * row, map_side)
        for cell_y in np.flatnonzero((indices == y).any(axis=1)):
            for cell_x in np.flatnonzero((indices == x).any(axis=1)):
                assert (features[row] <= context[cell_y * context_side + cell_x]).all()
                compared += 1
    assert compared >= len(features)


@pytest.mark.parametrize(("size", "cells"), [(0, 1), (1, 0), (-3, 2), (4, -1)])
def test_pooling_needs_positive_sizes(size: int, cells: int) -> None:
    with pytest.raises(ValueError, match=f"{size} rows into {cells} cells"):
        pooling_cells(size, cells)


@settings(deadline=None)
@given(old=st.integers(1, 30), new=st.integers(1, 40))
def test_resize_is_torchs_bilinear_interpolation(old: int, new: int) -> None:
    torch = pytest.importorskip("torch")
    features = np.random.default_rng(old).standard_normal((old * old, 3)).astype(np.float32)
    resized = resize_grid(features, new)
    assert (resized.shape, resized.dtype) == ((new * new, 3), np.dtype(np.float32))
    maps = torch.from_numpy(features).T.reshape(1, 3, old, old)
    expected = torch.nn.functional.interpolate(maps, (new, new), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resized, expected[0].flatten(1).T.numpy(), rtol=0, atol=2e-5)


def test_resize_by_hand() -> None:
    ramp = np.arange(4, dtype=np.float32)
    features = (10 * ramp[:, None] + ramp).reshape(16, 1)
    np.testing.assert_array_equal(resize_grid(features, 2)[:, 0], [5.5, 7.5, 25.5, 27.5])
    np.testing.assert_array_equal(resize_grid(features[:4], 4)[:4, 0], [0, 0.25, 0.75, 1])


def test_resize_to_the_same_side_returns_the_input() -> None:
    features = np.ones((9, 2), np.float32)
    assert resize_grid(features, 3) is features


def test_resize_refuses_maps_that_are_not_square() -> None:
    with pytest.raises(ValueError, match="8 is not a square"):
        resize_grid(np.ones((8, 2), np.float32), 2)
    with pytest.raises(ValueError, match="side of 0"):
        resize_grid(np.ones((9, 2), np.float32), 0)
