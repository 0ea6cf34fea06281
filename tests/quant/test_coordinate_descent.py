"""Coordinate descent against a float64 reference that recomputes the gradient at every step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fusion_edge.quant.coordinate_descent import CoordinateDescent

Floats = npt.NDArray[np.float64]


class Problem:
    """Coarsely quantized weights, and the Hessian of correlated inputs."""

    def __init__(self, columns: int, group_size: int, rows: int = 5) -> None:
        generator = np.random.default_rng(columns)
        groups = -(-columns // group_size)
        mixing = generator.normal(size=(columns, columns)) / columns**0.5 + np.eye(columns)
        self.group_of = np.arange(columns) // group_size
        self.group_size = group_size
        self.weights = generator.normal(size=(columns, rows))
        self.hessian = mixing @ mixing.T
        self.scales = generator.uniform(0.3, 0.6, size=(groups, rows)).astype(np.float16).astype(np.float64)
        self.zeros = generator.integers(6, 10, size=(groups, rows)).astype(np.float64)
        self.codes = np.clip(np.rint(self.weights / self.scales[self.group_of]) + self.zeros[self.group_of], 0, 15)

    def descent(self) -> CoordinateDescent:
        parts = (self.weights, self.codes, self.scales, self.zeros, self.hessian)
        weights, codes, scales, zeros, hessian = (torch.from_numpy(part).float() for part in parts)
        return CoordinateDescent(weights, codes, scales, zeros, hessian, self.group_size)

    def errors(self) -> Floats:
        difference: Floats = self.weights - (self.codes - self.zeros[self.group_of]) * self.scales[self.group_of]
        return difference

    def error(self) -> float:
        return float(np.sum(self.errors() * (self.hessian @ self.errors())))


CASES = [(1, 32), (33, 32), (128, 64), (150, 32), (300, 300)]


@pytest.mark.parametrize(("columns", "group_size"), CASES)
def test_codes(columns: int, group_size: int) -> None:
    problem = Problem(columns, group_size)
    descent, before = problem.descent(), problem.error()
    descent.update_codes(15)
    for i in range(columns):
        gradient = problem.hessian[i] @ problem.errors()
        best = problem.codes[i] + gradient / (problem.hessian[i, i] * problem.scales[problem.group_of[i]])
        problem.codes[i] = np.clip(np.rint(best), 0, 15)
    np.testing.assert_array_equal(descent.codes.numpy(), problem.codes)
    assert problem.error() <= before


@pytest.mark.parametrize(("columns", "group_size"), CASES)
def test_scales(columns: int, group_size: int) -> None:
    problem = Problem(columns, group_size)
    descent, before = problem.descent(), problem.error()
    descent.update_scales()
    for group in range(len(problem.scales)):
        rows = problem.group_of == group
        integers = problem.codes[rows] - problem.zeros[group]
        slope = np.sum(integers * (problem.hessian[rows] @ problem.errors()), 0)
        curvature = np.sum(integers * (problem.hessian[np.ix_(rows, rows)] @ integers), 0)
        step = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
        scale = problem.scales[group]
        problem.scales[group] = np.clip(scale + step, 0.5 * scale, 1.5 * scale)
    np.testing.assert_allclose(descent.scales.numpy(), problem.scales, rtol=2**-10)  # float16
    assert problem.error() <= before


def test_the_gradient_stays_current() -> None:
    """Codes, scales and codes again give the same result as a restart before the last step."""
    problem = Problem(150, 32)
    continued = problem.descent()
    continued.update_codes(15)
    continued.update_scales()
    problem.codes, problem.scales = (part.double().numpy() for part in (continued.codes, continued.scales))
    restarted = problem.descent()
    for descent in (continued, restarted):
        descent.update_codes(15)
    np.testing.assert_array_equal(continued.codes.numpy(), restarted.codes.numpy())
