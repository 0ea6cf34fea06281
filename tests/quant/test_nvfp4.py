"""NVFP4 against a plain reference with the types of ml_dtypes, and GPTQ against rounding to nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusion_edge.quant import nvfp4
from fusion_edge.quant.formats import Nvfp4Activations, WeightFormat
from fusion_edge.quant.gptq import FactorizedHessian, output_error
from fusion_edge.quant.observer import fake_quantize
from fusion_edge.quant.packing import dequantize

Floats = npt.NDArray[np.float32]
LARGEST, SMALLEST_SCALE = 6 * 448, 2.0**-9
scales = st.integers(-20, 4).map(lambda exponent: 2.0**exponent)
rows = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 6).map(lambda blocks: 16 * blocks)),
    elements=st.floats(-100, 100, width=32),
)


def reference(x: Floats, scale: float, least: float) -> tuple[Floats, Floats]:
    """Return values and scales of each block, ``[n, K/16, 16]`` and ``[n, K/16, 1]``."""
    blocks = x.reshape(len(x), -1, 16)
    ratio = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(6 * scale)
    stored = np.minimum(ratio, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found = np.maximum(stored, np.float32(least)) * np.float32(scale)
    scaled = np.divide(blocks, found, out=np.zeros_like(blocks), where=found > 0)
    return np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * found, found


@given(rows, scales)
@example(np.zeros((1, 16), np.float32), 1.0)
@example(np.full((1, 16), 1e-6, np.float32), 1.0)
@example(np.full((1, 32), 100, np.float32), 2.0**-20)
def test_activations(x: Floats, scale: float) -> None:
    """A block whose scale rounds to 0 becomes 0; one beyond 6 * 448 scales is clipped."""
    expected, _ = reference(x, scale, least=0)
    actual = fake_quantize(torch.from_numpy(x), Nvfp4Activations(scale))
    np.testing.assert_array_equal(actual.numpy(), expected.reshape(x.shape))


def test_activations_keep_shape_and_type() -> None:
    x = torch.randn(2, 0, 3, 32, dtype=torch.float16)
    quantized = nvfp4.fake_quantize(x, 1.0)
    assert (quantized.shape, quantized.dtype) == (x.shape, x.dtype)


@given(rows, scales)
def test_weights_rounded_to_nearest(weights: Floats, scale: float) -> None:
    expected, expected_scales = reference(weights, scale, SMALLEST_SCALE)
    rounded = nvfp4.quantize(torch.from_numpy(weights), scale, None)
    np.testing.assert_array_equal(rounded.values.numpy(), expected.reshape(weights.shape))
    np.testing.assert_array_equal(rounded.packed.scales, expected_scales[:, :, 0])
    assert rounded.packed.values.shape == nvfp4.FORMAT.packed_shape(*weights.shape)
    np.testing.assert_array_equal(dequantize(rounded.packed, nvfp4.FORMAT, weights.shape[1]), rounded.values.numpy())


def test_first_value_of_a_byte_is_in_the_low_nibble() -> None:
    weights = torch.zeros(1, 16)
    weights[0, :2] = torch.tensor([6.0, -0.5])
    packed = nvfp4.quantize(weights, 1.0, None).packed
    assert packed.values.tolist() == [[[0x97, 0, 0, 0, 0, 0, 0, 0]]]
    assert packed.scales.tolist() == [[1.0]]


@given(st.floats(2.0**-98, 2.0**100, width=32))
@example(2688.0)
@example(2689.0)
def test_tensor_scale(largest: float) -> None:
    """The least power of two that represents the value."""
    scale = nvfp4.tensor_scale(largest)
    assert np.log2(scale) == round(np.log2(scale))
    assert LARGEST * scale / 2 < largest <= LARGEST * scale


def test_tensor_scale_of_zeros() -> None:
    assert nvfp4.tensor_scale(0.0) == 1.0


@settings(deadline=None, max_examples=40)
@given(rows, st.booleans())
@example(np.pad(np.full((1, 1), 2.2e-41, np.float32), ((0, 0), (0, 31))), False)
def test_stored_scales_are_exact(weights: Floats, by_gptq: bool) -> None:
    """All scales of a weight are products of an E4M3 number above 0 and their common scale, in any parts of rows."""
    tensor = torch.from_numpy(weights)
    hessian = FactorizedHessian(torch.eye(weights.shape[1], dtype=torch.float64)) if by_gptq else None
    scale = nvfp4.tensor_scale(float(np.abs(weights).max()))
    found = np.concatenate([nvfp4.quantize(part, scale, hessian).packed.scales for part in torch.split(tensor, 2)])
    stored = found / np.float32(nvfp4.common_scale(found))
    np.testing.assert_array_equal(stored.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), stored)
    assert (stored > 0).all()
    assert stored.max() > 224 or scale == nvfp4.LEAST_TENSOR_SCALE


def test_tiny_weights_are_zero() -> None:
    """Their scale would be a subnormal number of float32, or 0."""
    tiny = torch.full((2, 16), 2e-41)
    quantized = nvfp4.quantize(tiny, nvfp4.tensor_scale(2e-41), None)
    assert (quantized.packed.scales >= np.finfo(np.float32).tiny).all()
    assert (dequantize(quantized.packed, nvfp4.FORMAT, 16) == 0).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_gptq_has_less_output_error(seed: int) -> None:
    """With correlated inputs, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(512, 64, generator=generator, dtype=torch.float64) @ mixing
    weights = torch.randn(8, 64, generator=generator)
    hessian = x.T @ x
    scale = nvfp4.tensor_scale(float(weights.abs().max()))
    nearest, gptq = (nvfp4.quantize(weights, scale, found) for found in (None, FactorizedHessian(hessian)))
    errors = [output_error(weights, one.values, hessian)[0] for one in (gptq, nearest)]
    assert errors[0] < 0.8 * errors[1]
    np.testing.assert_array_equal(dequantize(gptq.packed, nvfp4.FORMAT, 64), gptq.values.numpy())


def test_dead_channels_become_zero() -> None:
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[5, 5] = 0
    rounded = nvfp4.quantize(torch.ones(2, 32), 1.0, FactorizedHessian(hessian))
    assert rounded.values[:, 5].tolist() == [0, 0]


def test_format() -> None:
    fmt = WeightFormat.parse("nvfp4")
    assert (str(fmt), fmt.block_size, fmt.bits, fmt.scale_bits) == ("nvfp4", 16, 4, 8)
    assert fmt == nvfp4.FORMAT
    with pytest.raises(Exception, match="Unknown weight format 'nvfp4:32'; expected fp32, fp16, fp8, nvfp4, w8a8, or"):
        WeightFormat.parse("nvfp4:32")
