"""Bit allocation: the order of promotions, the budget, and counted bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_edge.quant.bit_allocation import Promotion, allocate, stored_bits
from fusion_edge.quant.formats import CODEBOOKS, GROUPED, WeightFormat, group_sizes
from fusion_edge.quant.packing import quantize
from fusion_edge.runtime.bundle.quantization_report import Sensitivity

FORMATS = [WeightFormat(kind, size) for kind in GROUPED for size in group_sizes().values() if kind not in CODEBOOKS]
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


@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from(FORMATS))
def test_stored_bits_match_packed_bytes(rows: int, inputs: int, fmt: WeightFormat) -> None:
    packed = quantize(np.ones((rows, inputs), np.float32), fmt)
    parts = [part for part in (packed.values, packed.scales, packed.zero_points) if part is not None]
    # The last 4-bit zero point of a row may fill only half of its byte.
    unused = 4 * rows * (packed.scales.shape[1] % 2) if fmt.kind == "uint4" else 0
    assert stored_bits((rows, inputs), fmt) == 8 * sum(part.nbytes for part in parts) - unused
