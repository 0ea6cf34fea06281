"""Bit allocation: the order of promotions, the budget, and counted bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.quant.bit_allocation import Promotion, allocate, stored_bits
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.packing import quantize
from fusion_edge.runtime.bundle.quantization_report import Sensitivity

SIZES = st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1)), max_size=12)
"""Extra bytes and KL divergence of linears."""


def promotions(sizes: list[tuple[int, float]]) -> list[Promotion]:
    return [Promotion(Sensitivity(f"linear{i}", kl, 20.0), size) for i, (size, kl) in enumerate(sizes)]


@given(SIZES, st.integers(0, 5000))
def test_the_budget_is_kept_and_used_up(sizes: list[tuple[int, float]], spare: int) -> None:
    size = {c.sensitivity.name: c.extra_bytes for c in promotions(sizes)}
    promoted = allocate(promotions(sizes), spare)
    left = spare - sum(size[name] for name in promoted)
    assert left >= 0
    assert all(size[name] > left for name in size.keys() - set(promoted))


@given(SIZES.filter(bool))
def test_order_is_kl_divergence_per_byte(sizes: list[tuple[int, float]]) -> None:
    priority = {c.sensitivity.name: c.sensitivity.kl_divergence / c.extra_bytes for c in promotions(sizes)}
    promoted = allocate(promotions(sizes), sum(size for size, _ in sizes))
    assert [priority[name] for name in promoted] == sorted(priority.values(), reverse=True)


def test_output_sqnr_decides_without_kl_divergence() -> None:
    found = [Promotion(Sensitivity(name, 0.0, quality), 10) for name, quality in (("good", 30.0), ("bad", 9.0))]
    assert allocate(found, 10) == ["bad"]


@given(st.integers(1, 5), st.integers(1, 200), st.sampled_from(["int4:32", "uint4:64", "int8:128"]))
def test_bits_are_those_stored(rows: int, inputs: int, fmt: str) -> None:
    packed = quantize(np.ones((rows, inputs), np.float32), WeightFormat.parse(fmt))
    zero_bytes = 0 if packed.zero_points is None else packed.zero_points.nbytes
    stored = 8 * (packed.values.nbytes + packed.scales.nbytes + zero_bytes)
    counted = stored_bits((rows, inputs), WeightFormat.parse(fmt))
    assert counted <= stored <= counted + 4 * rows  # zero points fill whole bytes
