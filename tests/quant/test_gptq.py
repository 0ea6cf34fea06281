"""GPTQ against the equations of the paper, and properties: no step increases the error."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_edge.quant.formats import CODEBOOKS, GROUPED, WeightFormat, group_sizes
from fusion_edge.quant.gptq import (
    CLIP_RATIOS,
    FactorizedHessian,
    GroupScales,
    coordinate_descent,
    gptq,
    invert_lower,
    output_error,
    pack_rows,
    round_columns,
    round_to_nearest,
    search_scales,
)
from fusion_edge.quant.packing import dequantize, quantize
from fusion_edge.runtime.errors import FusionError

EVEN_KINDS = [kind for kind in GROUPED if kind not in CODEBOOKS]
FORMATS = [*(WeightFormat(kind, size) for kind in EVEN_KINDS for size in group_sizes().values()), WeightFormat("w8a8")]
shapes = st.tuples(st.integers(1, 40), st.integers(1, 300))
seeds = st.integers(0, 2**32 - 1)


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random weights, and the Hessian of correlated inputs of unequal scale."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) @ mixing
    inputs *= torch.exp(torch.randn(columns, generator=generator))
    return weights, inputs.T.double() @ inputs.double()


def reference(weights: Tensor, factorized: FactorizedHessian, fmt: WeightFormat) -> npt.NDArray[np.float64]:
    """Quantize by equations 2 and 3 of the paper, with a new inverse for every column."""
    w: npt.NDArray[np.float64] = weights.double().numpy().copy()
    half = 1 << (fmt.bits - 1)
    damped = factorized.matrix.numpy() + factorized.damping * factorized.diagonal.mean().item() * np.eye(w.shape[1])
    groups = search_scales(weights, factorized.cost, fmt)
    scales, zeros = groups.scales.double().numpy(), groups.zeros.double().numpy()
    order = factorized.order.tolist()
    for i, column in enumerate(order):
        left = order[i:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        group = column // fmt.group(weights.shape[1])
        scale, zero = scales[:, group], zeros[:, group]
        rounded = (np.clip(np.round(w[:, column] / scale) + zero, 0, 2 * half - 1) - zero) * scale
        w[:, left] -= np.outer((w[:, column] - rounded) / inverse[0, 0], inverse[0])
        w[:, column] = rounded
    return w


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [1, 33, 128, 150])
def test_codes_match_reference_equations(fmt: WeightFormat, columns: int) -> None:
    weights, hessian = problem(24, columns, seed=columns)
    factorized = FactorizedHessian(hessian)
    groups = search_scales(weights, factorized.cost, fmt)
    codes = round_columns(weights, factorized, groups, fmt).to(torch.uint8)
    ours, theirs = pack_rows(codes, groups, fmt).values, torch.from_numpy(reference(weights, factorized, fmt)).float()
    # A value halfway between two codes may round either way in float32, which changes all columns after it.
    same = ((ours - theirs).abs() < 1e-6 * weights.abs().max()).float().mean()
    assert same > 0.97
    assert output_error(weights, ours, hessian)[0] <= 1.02 * output_error(weights, theirs, hessian)[0] + 1e-9


@settings(deadline=None, max_examples=40)
@given(shapes, seeds, st.sampled_from(FORMATS))
def test_coordinate_descent_never_increases_error(shape: tuple[int, int], seed: int, fmt: WeightFormat) -> None:
    weights, hessian = problem(*shape, seed)
    factorized = FactorizedHessian(hessian)
    groups = search_scales(weights, factorized.cost, fmt)
    codes = round_columns(weights, factorized, groups, fmt)
    after = pack_rows(*coordinate_descent(weights, codes, groups, factorized, fmt), fmt)
    before = pack_rows(codes.to(torch.uint8), groups, fmt)
    assert (after.packed.scales > 0).all()
    error, start = (output_error(weights, stored.values, factorized.damped.double())[0] for stored in (after, before))
    assert error <= start * (1 + 1e-4) + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(24, 40), st.integers(16, 300)), seeds, st.sampled_from(FORMATS))
def test_output_error_is_below_round_to_nearest(shape: tuple[int, int], seed: int, fmt: WeightFormat) -> None:
    """With many channels. With few, GPTQ compensates little and chance decides."""
    weights, hessian = problem(*shape, seed)
    quantized = output_error(weights, gptq(weights, FactorizedHessian(hessian), fmt).values, hessian)[0]
    rounded = output_error(weights, round_to_nearest(weights, fmt).values, hessian)[0]
    assert quantized < rounded


@settings(deadline=None, max_examples=40)
@given(shapes, seeds, st.sampled_from(FORMATS))
def test_packed_rows_dequantize_to_values(shape: tuple[int, int], seed: int, fmt: WeightFormat) -> None:
    weights, hessian = problem(*shape, seed)
    stored = gptq(weights, FactorizedHessian(hessian), fmt)
    assert (stored.packed.scales > 0).all()
    assert stored.packed.values.shape == fmt.packed_shape(*shape)
    np.testing.assert_array_equal(dequantize(stored.packed, fmt, shape[1]), stored.values.numpy())


@settings(deadline=None, max_examples=40)
@given(shapes, seeds, st.sampled_from(FORMATS))
def test_round_to_nearest_matches_packing(shape: tuple[int, int], seed: int, fmt: WeightFormat) -> None:
    weights, _ = problem(*shape, seed)
    stored, packed = round_to_nearest(weights, fmt), quantize(weights.numpy(), fmt)
    scales = packed.scales
    np.testing.assert_array_equal(stored.packed.scales, scales)
    # One multiplies by the inverse scale, the other divides: values halfway between two codes may differ by one.
    exact = dequantize(packed, fmt, shape[1])
    assert (np.abs(stored.values.numpy() - exact) <= scales.astype(np.float32).max() * 1.001).all()
    assert (stored.values.numpy() == exact).mean() > 0.99 or stored.values.numel() < 100


@settings(deadline=None, max_examples=40)
@given(shapes, seeds, st.sampled_from(FORMATS))
def test_searched_scales_are_no_worse(shape: tuple[int, int], seed: int, fmt: WeightFormat) -> None:
    weights, hessian = problem(*shape, seed)
    cost = FactorizedHessian(hessian).cost

    def error(groups: GroupScales) -> float:
        scales, zeros = (
            part.float().repeat_interleave(fmt.group(shape[1]), 1)[:, : shape[1]]
            for part in (groups.scales, groups.zeros)
        )
        rounded = (((weights / scales).round() + zeros).clamp(0, (1 << fmt.bits) - 1) - zeros) * scales
        return float(((weights - rounded).square() * cost).sum())

    # With the clip ratio 1 alone, the search returns scales that cover the extremes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CLIP_RATIOS, fmt.bits, (1.0, 1.0, 1))
        unclipped = search_scales(weights, cost, fmt)
    assert error(search_scales(weights, cost, fmt)) <= error(unclipped) * (1 + 1e-5)


def test_cost_of_an_error_after_compensation() -> None:
    _, hessian = problem(1, 40, seed=4)
    factorized = FactorizedHessian(hessian)
    damped = hessian.numpy() + factorized.damping * factorized.diagonal.mean().item() * np.eye(40)
    np.testing.assert_allclose(factorized.cost.numpy(), 1 / np.linalg.inv(damped).diagonal(), rtol=1e-4)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dead_channels_become_zero(fmt: WeightFormat) -> None:
    weights, hessian = problem(8, 140, seed=1)
    dead = torch.tensor([0, 31, 32, 139])
    hessian[dead] = hessian[:, dead] = 0
    quantized = gptq(weights, FactorizedHessian(hessian), fmt).values
    assert (quantized[:, dead] == 0).all()
    alive = torch.ones(140, dtype=torch.bool)
    alive[dead] = False
    error, signal = output_error(weights[:, alive], quantized[:, alive], hessian[alive][:, alive])
    assert error < 0.02 * signal


def test_all_channels_dead() -> None:
    quantized = gptq(torch.randn(4, 32), FactorizedHessian(torch.zeros(32, 32, dtype=torch.float64)), FORMATS[0])
    assert (quantized.values == 0).all()


def test_fewer_samples_than_channels() -> None:
    """The Hessian is singular."""
    weights, _ = problem(8, 64, seed=2)
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).double()
    hessian = rows.T @ rows
    quantized = gptq(weights, FactorizedHessian(hessian), FORMATS[0]).values
    rounded = round_to_nearest(weights, FORMATS[0]).values
    assert output_error(weights, quantized, hessian)[0] < output_error(weights, rounded, hessian)[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_hessian(value: float) -> None:
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[3, 3] = value
    with pytest.raises(FusionError, match="not finite"):
        FactorizedHessian(hessian)


def test_indefinite_hessian() -> None:
    """Not positive definite at any allowed damping."""
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = -1e6
    with pytest.raises(FusionError, match="singular"):
        FactorizedHessian(hessian)


@pytest.mark.parametrize("size", [1, 5, 256, 257, 700])
def test_triangular_inverse(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64).tril() / size + torch.eye(size)
    inverse = invert_lower(lower)
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (inverse.triu(1) == 0).all()
