"""Attention operators of the CPU kernels against float64 and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support.attention_graphs import (
    Array,
    Causal,
    cached_feeds,
    cached_model,
    causal_feeds,
    causal_model,
    causal_reference,
    multi_head_model,
    multi_head_reference,
    packed_model,
    session,
)
from support.cpu_kernel_switches import exact_attention, needs_cpu_kernels

from fusion_edge.runtime.backends.onnxruntime import cpu_kernels

WIDTHS = (8, 16, 64, 72, 80, 96, 128, 256)
FLOAT32 = 3e-6  # absolute, for values of a few units

pytestmark = needs_cpu_kernels


@pytest.fixture
def library() -> Iterator[Path]:
    """Path of the kernels, with attention in float32."""
    path = cpu_kernels.library()
    assert path is not None
    with exact_attention():
        yield path


@pytest.mark.parametrize("width", [3, *WIDTHS])
def test_multi_head(library: Path, width: int) -> None:
    heads = 2
    model = multi_head_model(heads)
    ours, theirs = session(model, library, threads=2), session(model, None)
    random = np.random.default_rng(width)
    for batch, queries, keys in [(1, 1, 1), (2, 2, 7), (1, 7, 64), (2, 65, 300), (1, 300, 65), (1, 12, 33)]:
        some = (random.random((batch, keys)) < 0.5).astype(np.int32)
        some[:, 0] = 1
        one, none = np.zeros_like(some), np.zeros_like(some)
        one[:, keys // 2] = 1
        for mask in (np.ones_like(some), some, one, none):
            shapes = {"q": queries, "k": keys, "v": keys}
            feeds: dict[str, Array] = {
                name: random.normal(size=(batch, rows, heads * width)).astype(np.float32)
                for name, rows in shapes.items()
            }
            feeds["mask"] = mask
            attended = ours.run(None, feeds)[0]
            np.testing.assert_allclose(attended, theirs.run(None, feeds)[0], atol=FLOAT32)
            if mask.any():  # else adding the mask value absorbs the scores in float32, and all weights are equal
                np.testing.assert_allclose(attended, multi_head_reference(feeds, heads), atol=FLOAT32)


@pytest.mark.parametrize("patches", [None, 1, 40, 65])
@pytest.mark.parametrize("width", [8, 72])
def test_packed(library: Path, width: int, patches: int | None) -> None:
    """Packed query, key and value rows, of which all or the first attend."""
    random, heads, rows = np.random.default_rng(width), 2, 65
    qkv = random.normal(size=(2, rows, 3 * heads * width)).astype(np.float32)
    mask = (random.random((2, rows)) < 0.7).astype(np.int32)
    mask[:, 0] = 1
    q, k, v = np.split(qkv, 3, axis=2)
    expected = multi_head_reference({"q": q, "k": k, "v": v, "mask": mask}, heads)
    if patches is not None:
        expected[:, patches:] = v.mean(1, keepdims=True)
    feeds = {"qkv": qkv, "key_mask": mask}
    for kernels in (library, None):
        (attended,) = session(packed_model(heads, patches), kernels, threads=2).run(None, feeds)
        np.testing.assert_allclose(attended, expected, atol=FLOAT32)


def test_packed_rejects_wrong_shapes(library: Path) -> None:
    qkv, mask = np.zeros((1, 4, 48), np.float32), np.ones((1, 4), np.int32)
    model = session(packed_model(2, 3), library)
    with pytest.raises(Exception, match=r"heads \* width"):
        model.run(None, {"qkv": qkv[:, :, 1:], "key_mask": mask})
    with pytest.raises(Exception, match="expected key_mask"):
        model.run(None, {"qkv": qkv, "key_mask": mask[:, :3]})
    with pytest.raises(Exception, match="as many rows as patches"):
        model.run(None, {"qkv": qkv[:, :2], "key_mask": mask[:, :2]})
    for heads, patches in ((0, 3), (2, 0)):
        with pytest.raises(Exception, match="an integer from 1 to"):
            session(packed_model(heads, patches), library)
    nothing = session(packed_model(2, None), library).run(None, {"qkv": qkv[:0], "key_mask": mask[:0]})[0]
    assert nothing.shape == (0, 4, 16)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("width", WIDTHS)
def test_causal(library: Path, width: int, heads: int, kv_heads: int, int8: bool) -> None:
    sizes = Causal(heads, kv_heads, width, rotary=width // 32 * 16 or width, int8=int8)
    model = causal_model(sizes)
    ours, theirs = session(model, library, threads=2), session(model, None)
    for past, capacity, length in [
        (0, 1, 1), (5, 10, 1), (17, 17, 1), (299, 400, 1), (0, 0, 2), (4, 20, 7), (0, 64, 64), (0, 70, 65), (0, 0, 300),
        (30, 120, 65),
    ]:  # fmt: skip
        feeds = causal_feeds(sizes, past, capacity, length)
        attended, *present = ours.run(None, feeds)
        np.testing.assert_allclose(attended, causal_reference(sizes, feeds, (present[0], present[1])), atol=FLOAT32)
        if width % 16:
            continue  # ONNX Runtime does not support it
        expected, *caches = theirs.run(None, feeds)
        for cache, other in zip(present, caches, strict=True):
            # A rotated key may be so close to a tie that the order of a sum decides its rounding.
            np.testing.assert_allclose(cache.astype(np.float32), other, atol=1 if int8 else 1e-6)
            assert np.mean(np.abs(cache.astype(np.float32) - other) > 1e-6) < 1e-3
        if all(np.array_equal(cache, other) for cache, other in zip(present, caches, strict=True)) or not int8:
            np.testing.assert_allclose(attended, expected, atol=FLOAT32)


@pytest.mark.parametrize("int8", [False, True])
def test_in_place_cache_keeps_the_rest(library: Path, int8: bool) -> None:
    sizes = Causal(4, 2, 32, 32, int8)
    feeds = causal_feeds(sizes, past=20, capacity=30, length=1)
    model = session(causal_model(sizes), library)
    expected = model.run(None, feeds)
    binding = model.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("attended")
    for part in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{part}", values[f"past_{part}"])
    model.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected[0])
    for part, separate in zip(("key", "value"), expected[1:], strict=True):
        cache = values[f"past_{part}"].numpy()
        np.testing.assert_array_equal(cache[:, :, :21], separate[:, :, :21])
        np.testing.assert_array_equal(cache[:, :, 21:], feeds[f"past_{part}"][:, :, 21:])
        assert not separate[:, :, 21:].any()


@pytest.mark.parametrize("width", [16, 96])
@pytest.mark.parametrize("in_place", [(), ("key",), ("key", "value", "key_scale", "value_scale")], ids=str)
@pytest.mark.parametrize(
    ("past", "capacity", "length"), [(0, 1, 1), (0, 40, 1), (0, 200, 130), (0, 30, 30), (20, 50, 1)]
)
def test_cached_attention_matches_its_function(
    library: Path, width: int, in_place: tuple[str, ...], past: int, capacity: int, length: int
) -> None:
    """The kernel and the inlined function in ONNX Runtime give the same results."""
    sizes = Causal(4, 2, width, width, int8=True)
    feeds = cached_feeds(sizes, past, capacity, length)
    feeds["qkv"][0, :, -1] = 0  # an all-zero channel of the last value: its scale is the smallest
    expected = session(cached_model(sizes), None).run(None, feeds)
    model = session(cached_model(sizes), library, threads=2)
    binding = model.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in model.get_outputs():
        tensor = output.name.partition(".")[2]
        if tensor in in_place:
            binding.bind_ortvalue_output(output.name, values[f"past.{tensor}"])
        else:
            binding.bind_output(output.name)
    model.run_with_iobinding(binding)
    attended, *tensors = binding.copy_outputs_to_cpu()
    np.testing.assert_allclose(attended, expected[0], atol=FLOAT32)
    for scale, other in zip(tensors[2:], expected[3:], strict=True):
        np.testing.assert_allclose(scale, other, rtol=1e-6)
    for cache, other, part in zip(tensors, expected[1:3], ("key", "value"), strict=False):
        difference = np.abs(cache.astype(int) - other)[:, :, : past + length]
        assert difference.max() <= 1
        assert difference.mean() < 1e-3
        rest = cache[:, :, past + length :]
        is_kept = past == 0 or part in in_place  # the rest of the cache; a decode step that is not in place clears it
        np.testing.assert_array_equal(rest, feeds[f"past.{part}"][:, :, past + length :] if is_kept else 0)


def test_cached_attention_rejects_wrong_inputs(library: Path) -> None:
    sizes = Causal(2, 2, 16, 16, int8=True)
    model = session(cached_model(sizes), library)
    feeds = cached_feeds(sizes, past=0, capacity=8, length=4)
    with pytest.raises(Exception, match=r"a prefill of 4 tokens that end at position 4; expected .* cache of 3"):
        model.run(None, feeds | {f"past.{part}": feeds[f"past.{part}"][:, :, :3] for part in ("key", "value")})
    with pytest.raises(
        Exception, match="a prefill of 2 tokens that end at position 6; expected to begin at position 0"
    ):
        model.run(None, cached_feeds(sizes, past=4, capacity=8, length=2) | {"is_prefill": np.array(True)})
    with pytest.raises(Exception, match="scales of keys and values"):
        model.run(None, feeds | {"past.key_scale": feeds["past.key_scale"][:, :1]})


def test_cache_values_round_to_even_and_saturate(library: Path) -> None:
    sizes = Causal(1, 1, 16, 16, int8=True)
    feeds = causal_feeds(sizes, past=0, capacity=1, length=1)
    feeds["value_scale"] = np.full_like(feeds["value_scale"], 0.25)
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5, -128.5, -300, 300, 3.49, 3.5, 1e30, -1e30]
    feeds["qkv"][0, 0, 32:] = np.array(values, np.float32) * np.float32(0.25)
    present = session(causal_model(sizes), library).run(None, feeds)[2]
    assert present.ravel().tolist() == [0, 2, 2, 0, -2, -2, 126, 127, -128, -128, -128, 127, 3, 4, 127, -128]


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"local_window_size": 4}, "local_window_size"),
        ({"rotary_interleaved": 1}, "rotary_interleaved"),
        ({"smooth_softmax": 1}, "smooth_softmax"),
        ({"qk_output": 1}, "qk_output"),
        ({"do_rotary": 0}, "do_rotary"),
        ({"softcap": 5.0}, "softcap"),
        ({"k_quant_type": "PER_TENSOR"}, "k_quant_type"),
        ({"kv_num_heads": 3}, "kv_num_heads"),
    ],
)
def test_unsupported_attributes_are_named(library: Path, attributes: dict[str, object], named: str) -> None:
    with pytest.raises(Exception, match=named):
        session(causal_model(Causal(2, 2, 16, 16), **attributes), library)


def test_causal_rejects_wrong_shapes(library: Path) -> None:
    sizes = Causal(2, 2, 16, 16)
    model = session(causal_model(sizes), library)
    feeds = causal_feeds(sizes, past=4, capacity=8, length=2)
    too_far = feeds | {"total_length": np.array(40, np.int32), "last_position": np.array([39], np.int32)}
    with pytest.raises(Exception, match="past's length do not agree"):
        model.run(None, too_far)
    with pytest.raises(Exception, match="cos and sin"):
        model.run(None, feeds | {"cos": feeds["cos"][:3], "sin": feeds["sin"][:3]})
    with pytest.raises(Exception, match=r"expected query \[1, length"):
        model.run(None, feeds | {"qkv": np.repeat(feeds["qkv"], 2, 0)})
    with pytest.raises(Exception, match="unidirectional"):
        session(multi_head_model(2, unidirectional=1), library)
