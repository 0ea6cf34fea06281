"""Histogram observer: counts, and quantization that is at least as good as one without clipping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_edge.quant.formats import ActivationQuantization
from fusion_edge.quant.observer import BINS, HistogramObserver, fake_quantize

seeds = st.integers(0, 2**32 - 1)


def values(seed: int, count: int, shift: float, scale: float) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale + shift


def error(x: torch.Tensor, quantization: ActivationQuantization) -> float:
    return float((fake_quantize(x, quantization) - x).double().square().mean())


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(-3, 3), st.floats(1e-3, 1e3), st.integers(1, 5))
def test_search_is_no_worse_than_no_clipping(seed: int, shift: float, scale: float, batches: int) -> None:
    x = values(seed, 4000, shift * scale, scale)
    observer = HistogramObserver()
    for part in torch.chunk(x, batches):
        observer.observe(part)
    least, largest = min(float(x.min()), 0), max(float(x.max()), 0)
    extremes = ActivationQuantization((largest - least) / 255, round(-least / ((largest - least) / 255)))
    quantization = observer.quantization()
    assert 0 <= quantization.zero_point <= 255
    assert error(x, quantization) <= error(x, extremes) * 1.05


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 30))
def test_batch_order_does_not_matter(seed: int, pieces: int) -> None:
    """The histogram's range doubles when a batch exceeds it."""
    batches = [values(seed + i, 500, 0, float(2 ** (i % 6))) for i in range(pieces)]
    found = []
    for order in (batches, batches[::-1]):
        observer = HistogramObserver()
        for batch in order:
            observer.observe(batch)
        found.append(observer.quantization())
    x = torch.cat(batches)
    assert error(x, found[0]) == pytest.approx(error(x, found[1]), rel=0.1)


def test_outliers_are_clipped() -> None:
    x = torch.cat([values(0, 1_000_000, 0, 1), torch.tensor([40.0])])
    observer = HistogramObserver()
    observer.observe(x)
    assert observer.quantization().scale * 255 < 30


@pytest.mark.parametrize("x", [torch.zeros(10), torch.full((10,), 3.0), torch.full((10,), -2.5), torch.tensor([1e-30])])
def test_constants(x: torch.Tensor) -> None:
    observer = HistogramObserver()
    observer.observe(x)
    quantization = observer.quantization()
    assert (fake_quantize(x, quantization) - x).abs().max() <= 0.02 * x.abs().max() + 1e-9
    assert fake_quantize(torch.zeros(1), quantization) == 0


def test_memory_does_not_grow() -> None:
    observer = HistogramObserver()
    for i in range(50):
        observer.observe(values(i, 100, 0, float(1.5**i)))
    assert observer._counts.shape == (BINS,)
    assert observer._counts.sum() == 5000


def test_fake_quantize_matches_onnxruntime() -> None:
    """Against ONNX Runtime's QuantizeLinear and DequantizeLinear, ties and clipping included."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    quantization = ActivationQuantization(0.5, 100)
    x = np.arange(-80, 120, 0.125, dtype=np.float32)
    scalars = [numpy_helper.from_array(np.float32(0.5), "s"), numpy_helper.from_array(np.uint8(100), "z")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], scalars)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), quantization).numpy(), expected)
