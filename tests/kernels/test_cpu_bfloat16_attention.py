"""Attention of many rows in bfloat16, the default where supported, on every tier against float64.

A factor is rounded with a relative error of up to 2^-9. So a score is off by at most 2 * 2^-9 * |scale| * sum |q k|, a
weight by as much relatively and by another 2^-9, and values by 2^-9.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.attention_graphs import (
    Array,
    Causal,
    causal_feeds,
    causal_model,
    causal_reference,
    multi_head_model,
    multi_head_reference,
    session,
)
from support.cpu_kernel_switches import exact_attention, needs_cpu_kernels, tier

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

ROUNDING = 2.0**-9  # of a factor, relatively

pytestmark = needs_cpu_kernels


@pytest.fixture(scope="module", params=cpu_kernels.TIERS, autouse=True)
def each_tier(request: pytest.FixtureRequest) -> Iterator[str]:
    with tier(request.param):
        yield request.param


def library() -> Path:
    path = cpu_kernels.library()
    assert path is not None
    return path


def root_mean_square(error: Array) -> float:
    return float(np.sqrt(np.mean(error**2)))


def multi_head_feeds(
    random: np.random.Generator, queries: int, keys: int, row_width: int, size: float = 1, batch: int = 1
) -> dict[str, Array]:
    feeds: dict[str, Array] = {
        name: random.normal(size=(batch, rows, row_width)).astype(np.float32)
        for name, rows in (("q", queries), ("k", keys), ("v", keys))
    }
    feeds["q"] *= size
    feeds["mask"] = (random.random((batch, keys)) < 0.8).astype(np.int32)
    feeds["mask"][:, 0] = 1
    return feeds


def largest_error(largest_score: float, values: Array) -> float:
    """Return a bound of a result's error. ``largest_score``: of scale * sum |q k|."""
    # Errors of weights change numerator and denominator. 1e-3: second order, float32 sums and the polynomial of 2^x.
    relative = 2 * (2 * ROUNDING * largest_score + ROUNDING) + ROUNDING + 1e-3
    return relative * float(np.abs(values).max())


def largest_multi_head_error(feeds: dict[str, Array], heads: int) -> float:
    q, k = (np.abs(feeds[name].reshape(*feeds[name].shape[:2], heads, -1)).astype(np.float64) for name in "qk")
    scores = np.einsum("bqhw,bkhw->bhqk", q, k) * q.shape[-1] ** -0.5
    return largest_error(float(scores.max()), feeds["v"])


def largest_causal_error(sizes: Causal, feeds: dict[str, Array], keys: Array, values: Array) -> float:
    """Rotation changes sum |q k|, but not the product of norms above it."""
    queries = feeds["qkv"].reshape(-1, sizes.heads + 2 * sizes.kv_heads, sizes.width)[:, : sizes.heads]
    scales = [feeds[f"{part}_scale"] if sizes.int8 else np.float32(1) for part in ("key", "value")]
    norms = (np.linalg.norm(x, axis=-1).max() for x in (queries, keys * scales[0]))
    return largest_error(float(np.prod(list(norms))) * sizes.width**-0.5, values * scales[1])


@given(
    width=st.integers(1, 256),
    heads=st.integers(1, 3),
    queries=st.integers(2, 70),
    keys=st.integers(1, 600),
    size=st.sampled_from([0.1, 1]),
    seed=st.integers(0, 2**32 - 1),
)
@example(1, 1, 2, 1, 1, 0)
@example(256, 1, 33, 513, 1, 1)
@example(72, 3, 200, 1100, 1, 2)  # parts of rows; several blocks of keys
@settings(max_examples=60, deadline=None)
def test_multi_head(width: int, heads: int, queries: int, keys: int, size: float, seed: int) -> None:
    feeds = multi_head_feeds(np.random.default_rng(seed), queries, keys, heads * width, size, batch=2)
    (attended,) = session(multi_head_model(heads), library(), threads=2).run(None, feeds)
    assert np.abs(attended - multi_head_reference(feeds, heads)).max() <= largest_multi_head_error(feeds, heads)


@pytest.mark.parametrize("width", [3, 8, 16, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("size", [1, 3])
def test_typical_error(width: int, size: int) -> None:
    """Errors are within 0.5 % of a result's standard deviation, and there are some."""
    one = session(multi_head_model(2), library())
    for keys in (1, 33, 130, 301):
        feeds = multi_head_feeds(np.random.default_rng(width), 65, keys, 2 * width, size)
        rounded = one.run(None, feeds)[0]
        assert root_mean_square(rounded - multi_head_reference(feeds, 2)) < 5e-3 * size * np.std(feeds["v"])
        with exact_attention():
            has_bfloat16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
            assert np.array_equal(rounded, one.run(None, feeds)[0]) is not has_bfloat16


@given(
    half=st.integers(1, 128),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    past=st.sampled_from([0, 1, 31, 32, 300]),
    length=st.integers(2, 130),
    int8=st.booleans(),
)
@example(48, 2, 1, 0, 700, False)
@example(64, 2, 4, 749, 163, True)
@settings(max_examples=60, deadline=None)
def test_causal(half: int, kv_heads: int, group: int, past: int, length: int, int8: bool) -> None:
    sizes = Causal(group * kv_heads, kv_heads, 2 * half, 2 * half, int8)
    feeds = causal_feeds(sizes, past, past + length, length)
    attended, *present = session(causal_model(sizes), library(), threads=2).run(None, feeds)
    expected = causal_reference(sizes, feeds, (present[0], present[1]))
    assert np.abs(attended - expected).max() <= largest_causal_error(sizes, feeds, present[0], present[1])
    if attended.size > 2000:  # else one rounding may be much of the mean
        assert root_mean_square(attended - expected) < 5e-3 * expected.std()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("past", [1, 40, 300])
def test_suffix_equals_the_whole_prompt(each_tier: str, past: int, int8: bool) -> None:
    """With AMX a row's result depends neither on the rows beside it nor on the keys after it.

    With AVX-512 a masked block multiplies it by 2^0, of which the last bit is wrong.
    """
    sizes, total = Causal(4, 2, 96, 96, int8), 340
    model = session(causal_model(sizes), library())
    whole = causal_feeds(sizes, 0, total, total)
    attended, *present = model.run(None, whole)
    rest = whole | {"qkv": whole["qkv"][:, past:]}
    rest |= {f"past_{part}": cache for part, cache in zip(("key", "value"), present, strict=True)}
    bits = 0 if each_tier == "AMX" else 4 * np.finfo(np.float32).eps
    np.testing.assert_allclose(model.run(None, rest)[0], attended[:, past:], rtol=0, atol=bits * np.abs(attended).max())


def test_all_keys_masked() -> None:
    """The mask value absorbs the scores: all weights are equal."""
    feeds = multi_head_feeds(np.random.default_rng(0), 40, 70, 48)
    feeds["mask"][:] = 0
    (attended,) = session(multi_head_model(1), library()).run(None, feeds)
    mean = np.broadcast_to(feeds["v"].mean(1, keepdims=True), attended.shape)
    np.testing.assert_allclose(attended, mean, atol=ROUNDING * np.abs(feeds["v"]).mean())


def test_masked_keys_have_no_weight() -> None:
    feeds = multi_head_feeds(np.random.default_rng(0), 40, 70, 48)
    feeds["mask"][:, 20:] = 0
    model = session(multi_head_model(1), library())
    (attended,) = model.run(None, feeds)
    for name in "kv":
        feeds[name][:, 20:] *= 100
    np.testing.assert_array_equal(model.run(None, feeds)[0], attended)


@pytest.mark.parametrize(("name", "value"), [("q", np.nan), ("k", np.nan), ("v", np.nan), ("k", np.inf), ("v", np.inf)])
def test_no_infinity_or_nan_is_hidden(name: str, value: float) -> None:
    """They reach every result that depends on them, and no other head's."""
    feeds = multi_head_feeds(np.random.default_rng(0), 40, 70, 2 * 48)
    feeds["mask"][:] = 1
    feeds["q"] = np.abs(feeds["q"])  # so that an infinite key gives infinite scores
    feeds[name][0, 33, 5] = value
    (attended,) = session(multi_head_model(2), library()).run(None, feeds)
    finite = np.isfinite(attended[0])
    assert finite[:, 48:].all()
    expected = np.ones((40, 48), bool)
    if name == "q":
        expected[33] = False
    elif name == "k":
        expected[:] = False
    else:
        expected[:, 5] = False
    np.testing.assert_array_equal(finite[:, :48], expected)


def test_rows_of_the_driver_in_parts() -> None:
    """One head of many rows: several threads share it."""
    sizes = Causal(4, 1, 64, 64)
    feeds = causal_feeds(sizes, 5, 305, 300)
    with_two, with_one = (session(causal_model(sizes), library(), threads).run(None, feeds) for threads in (2, 1))
    for own, other in zip(with_two, with_one, strict=True):
        np.testing.assert_array_equal(own, other)
