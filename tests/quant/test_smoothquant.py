"""SmoothQuant: the same function in real arithmetic, and errors that histograms predict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.channels import outliers, rows
from support.checkpoints import TINY
from torch import Tensor

from fusion_edge.export.checkpoint.tensor_mapping import parameters
from fusion_edge.export.model import architecture
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.quant import smoothquant
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.observer import fake_quantize
from fusion_edge.quant.smoothquant import ChannelHistograms, divide_last_rows, find_producer, smoothing_factors

LINEAR, NORM = "vision.layers.0.mlp.up", "vision.layers.0.mlp_norm"
W8A8 = {LINEAR: WeightFormat("w8a8")}


# The same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "mlp.up"])
def test_smoothing_preserves_the_function(layer: int, name: str) -> None:
    """In both halves of the layers: text rows attend differently in the first."""
    generator = torch.Generator().manual_seed(layer)
    weights = {
        parameter: torch.randn(facts.shape, generator=generator, dtype=torch.float64) / facts.shape[-1] ** 0.5
        for parameter, facts in parameters(TINY).items()
        if parameter.startswith("vision.layers.")
    }
    x = torch.randn(2, TINY.vision.patches + 3, TINY.vision.width, generator=generator, dtype=torch.float64)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)

    def outputs() -> Tensor:
        states = [x] if layer == 0 else [x, x]
        return architecture.vision_layer(EagerOperations(TINY, weights.__getitem__), TINY, states, mask, layer)[0]

    expected, linear = outputs(), f"vision.layers.{layer}.{name}"
    formats = dict.fromkeys((f"vision.layers.{layer}.{part}" for part in smoothquant._PRODUCERS), WeightFormat("w8a8"))
    source = find_producer(linear, formats)
    assert source is not None
    factors = torch.rand(TINY.vision.width, generator=generator, dtype=torch.float64) * 9 + 0.1
    for parameter in smoothquant.producer_parameters(source):
        weights[parameter] = divide_last_rows(weights[parameter], factors)
    assert not torch.allclose(outputs(), expected)
    weights[f"{linear}.weight"] *= factors
    torch.testing.assert_close(outputs(), expected, rtol=1e-10, atol=1e-10)


def test_only_quantized_activations_have_a_producer() -> None:
    out, qkv = "vision.layers.3.attention.out", "vision.layers.3.attention.qkv"
    w8a8, fp16 = WeightFormat("w8a8"), WeightFormat("fp16")
    assert find_producer(out, {out: w8a8, qkv: w8a8}) == qkv
    assert find_producer(out, {out: w8a8, qkv: fp16}) is None  # written as the checkpoint has it
    assert find_producer(out, {out: fp16, qkv: w8a8}) is None
    assert find_producer(qkv, {out: fp16, qkv: w8a8}) == "vision.layers.3.attention_norm"
    for other in ("vision.layers.0.mlp.down", "vision.projector.up", "llm.layers.0.mlp.up", "alignment.layers.0.key"):
        assert find_producer(other, {other: w8a8}) is None


def test_factors() -> None:
    extents, weights = torch.tensor([1.0, 4, 16, 0, 5]), torch.tensor([[1.0, -4, 1, 1, 0], [0.5, 1, 1, 1, 0]])
    found = smoothing_factors(extents, weights, 0.5)
    expected = torch.tensor([1.0, 1, 4]) / 4 ** (1 / 3)
    torch.testing.assert_close(found, torch.cat([expected, torch.ones(2)]))
    torch.testing.assert_close(smoothing_factors(torch.zeros(5), weights, 0.5), torch.ones(5))


# Channel histograms ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_batches_do_not_matter(seed: int, pieces: int) -> None:
    x = rows(seed, 300, torch.logspace(-8, 8, 16)) * torch.linspace(0.01, 3, 300)[:, None]
    x[:, 5] = 0
    whole, parts = (ChannelHistograms(16, x.device) for _ in range(2))
    whole.observe(x)
    for part in torch.split(x.flip(0), -(-300 // pieces)):
        parts.observe(part[None])
    assert torch.equal(whole._counts, parts._counts)
    assert torch.equal(whole._bound, parts._bound)
    assert torch.equal(whole.absmax, parts.absmax)
    assert whole._counts.sum() == x.numel()


@pytest.mark.parametrize("scales", [torch.ones(64), outliers(64), torch.logspace(-3, 1, 64)])
@pytest.mark.parametrize("alpha", [None, 0.5, 1.0])
def test_predicted_error_matches_output_error(scales: Tensor, alpha: float | None) -> None:
    x, weights = rows(0, 20_000, scales), rows(1, 96, torch.ones(64))
    histograms = ChannelHistograms(64, x.device)
    histograms.observe(x)
    factors = torch.ones(64) if alpha is None else smoothing_factors(histograms.absmax, weights, alpha)
    quantization, error = histograms.quantization(factors, (weights * factors).square().sum(0))
    rounded = fake_quantize(x / factors, quantization) * factors
    actual = float(((rounded - x) @ weights.T).double().square().sum())
    assert error == pytest.approx(actual, rel=0.05)


def test_channels_that_are_always_zero() -> None:
    histograms = ChannelHistograms(4, torch.device("cpu"))
    histograms.observe(torch.zeros(3, 4))
    quantization, error = histograms.quantization(torch.ones(4), torch.ones(4))
    assert error == 0
    assert fake_quantize(torch.zeros(1), quantization) == 0


def test_channels_that_are_almost_zero() -> None:
    """Subnormal numbers, a result of weight decay: their inverse is infinite in float32."""
    x = rows(0, 1000, torch.tensor([1.0, 1e-30, 1e-40, 1e-45]))
    histograms = ChannelHistograms(4, x.device)
    for part in (torch.zeros(8, 4), x, 2 * x):
        histograms.observe(part)
    assert histograms._counts.sum(1).tolist() == [2008] * 4
    factors = smoothing_factors(histograms.absmax, torch.ones(1, 4), 0.4)
    assert torch.isfinite(factors).all()
    quantization, error = histograms.quantization(factors, torch.ones(4))
    actual = sum(
        float(((fake_quantize(y, quantization) - y) ** 2).double().sum()) for y in (x / factors, 2 * x / factors)
    )
    assert error == pytest.approx(actual, rel=0.05)
