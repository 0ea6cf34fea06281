"""SmoothQuant: the same function in real arithmetic, never a larger error, saved and resumed like any weight."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.checkpoints import TINY, write_checkpoint
from support.parity import assert_computes_its_weights
from torch import Tensor

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration import layer_quantizer, run
from fusion_edge.export.calibration.layer_quantizer import LayerQuantizer
from fusion_edge.export.calibration.observer import Observer
from fusion_edge.export.calibration.weight_store import WeightStore
from fusion_edge.export.checkpoint.tensor_mapping import VISION_MODEL, parameters
from fusion_edge.export.model import architecture
from fusion_edge.export.model.eager import EagerOperations
from fusion_edge.quant import smoothquant
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.gptq import round_to_nearest
from fusion_edge.quant.observer import fake_quantize
from fusion_edge.quant.smoothquant import ChannelHistograms, divide_last_rows, producer, smoothing_factors
from fusion_edge.runtime.bundle.manifest import QUANTIZATION

LINEAR, NORM = "vision.layers.0.mlp.up", "vision.layers.0.mlp_norm"
W8A8 = {LINEAR: WeightFormat("w8a8")}
OUTLIERS = [3, 17, 40]


def rows(seed: int, count: int, scales: Tensor) -> Tensor:
    return torch.randn(count, len(scales), generator=torch.Generator().manual_seed(seed)) * scales


def outliers(channels: int) -> Tensor:
    """Scales of channels, a few of them 50 times as large as the rest."""
    scales = torch.ones(channels)
    scales[OUTLIERS] = 50
    return scales


# The same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "mlp.up"])
def test_producer_and_linear_stay_the_same_function(layer: int, name: str) -> None:
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
    source = producer(linear, formats)
    assert source is not None
    factors = torch.rand(TINY.vision.width, generator=generator, dtype=torch.float64) * 9 + 0.1
    for parameter in smoothquant.producer_parameters(source):
        weights[parameter] = divide_last_rows(weights[parameter], factors)
    assert not torch.allclose(outputs(), expected)
    weights[f"{linear}.weight"] *= factors
    torch.testing.assert_close(outputs(), expected, rtol=1e-10, atol=1e-10)


def test_only_rounded_inputs_have_a_producer() -> None:
    out, qkv = "vision.layers.3.attention.out", "vision.layers.3.attention.qkv"
    w8a8, fp16 = WeightFormat("w8a8"), WeightFormat("fp16")
    assert producer(out, {out: w8a8, qkv: w8a8}) == qkv
    assert producer(out, {out: w8a8, qkv: fp16}) is None  # written as the checkpoint has it
    assert producer(out, {out: fp16, qkv: w8a8}) is None
    assert producer(qkv, {out: fp16, qkv: w8a8}) == "vision.layers.3.attention_norm"
    for other in ("vision.layers.0.mlp.down", "vision.projector.up", "llm.layers.0.mlp.up", "alignment.layers.0.key"):
        assert producer(other, {other: w8a8}) is None


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
def test_the_error_told_is_that_of_the_outputs(scales: Tensor, alpha: float | None) -> None:
    x, weights = rows(0, 20_000, scales), rows(1, 96, torch.ones(64))
    histograms = ChannelHistograms(64, x.device)
    histograms.observe(x)
    factors = torch.ones(64) if alpha is None else smoothing_factors(histograms.absmax, weights, alpha)
    grid, error = histograms.quantization(factors, (weights * factors).square().sum(0))
    rounded = fake_quantize(x / factors, grid) * factors
    actual = float(((rounded - x) @ weights.T).double().square().sum())
    assert error == pytest.approx(actual, rel=0.05)


def test_channels_that_are_always_zero() -> None:
    histograms = ChannelHistograms(4, torch.device("cpu"))
    histograms.observe(torch.zeros(3, 4))
    grid, error = histograms.quantization(torch.ones(4), torch.ones(4))
    assert error == 0
    assert fake_quantize(torch.zeros(1), grid) == 0


def test_channels_that_are_almost_zero() -> None:
    """Subnormal numbers, a result of weight decay: their inverse is infinite in float32."""
    x = rows(0, 1000, torch.tensor([1.0, 1e-30, 1e-40, 1e-45]))
    histograms = ChannelHistograms(4, x.device)
    for part in (torch.zeros(8, 4), x, 2 * x):
        histograms.observe(part)
    assert histograms._counts.sum(1).tolist() == [2008] * 4
    factors = smoothing_factors(histograms.absmax, torch.ones(1, 4), 0.4)
    assert torch.isfinite(factors).all()
    grid, error = histograms.quantization(factors, torch.ones(4))
    actual = sum(float(((fake_quantize(y, grid) - y) ** 2).double().sum()) for y in (x / factors, 2 * x / factors))
    assert error == pytest.approx(actual, rel=0.05)


# The choice --------------------------------------------------------------------------------------------------------


def fit(
    scales: Tensor, weight: Tensor, folder: Path, method: str, measured: Tensor | None = None
) -> tuple[float | None, float]:
    """Quantize a linear for inputs of such scales: the alpha chosen, and the SQNR of its outputs.

    They are those of the same inputs, or of ``measured``.
    """
    samples = rows(0, 4000, scales)
    given = {f"{LINEAR}.weight": weight, f"{NORM}.weight": torch.ones(len(scales)), f"{NORM}.bias": scales * 0}
    observer = Observer(None, given.__getitem__, None, "cpu", W8A8)  # type: ignore[arg-type]
    observer.linear(samples, LINEAR)
    folder.mkdir()
    store = WeightStore(folder, W8A8)
    (report,) = LayerQuantizer(W8A8, method, given.__getitem__, store).quantize(observer)
    factors, x = store.parameter(f"{NORM}.weight"), samples if measured is None else measured
    assert factors is not None
    inputs = fake_quantize(x * torch.from_numpy(factors), store.activation_quantization(LINEAR))
    outputs, expected = inputs @ torch.from_numpy(store.dequantized(LINEAR, len(scales))).T, x @ weight.T
    noise = (outputs - expected).double().square().sum()
    return report.equalisation, float(10 * torch.log10(expected.double().square().sum() / noise))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("weight_scales", [torch.ones(64), 1 / outliers(64)])
def test_outlier_channels(weight_scales: Tensor, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without weights that compensate the outliers, as in a trained model."""
    weight = rows(2, 96, weight_scales)
    others = rows(1, 100_000, outliers(64))
    alpha, smoothed = fit(outliers(64), weight, tmp_path / "smoothed", method, others)
    monkeypatch.setattr(layer_quantizer, "ALPHAS", ())
    nothing, unsmoothed = fit(outliers(64), weight, tmp_path / "off", method, others)
    assert nothing is None
    assert alpha is not None
    assert smoothed > unsmoothed + (3 if weight_scales[OUTLIERS[0]] == 1 else 20)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_never_worse_by_its_measure(method: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales, columns = (torch.randn(64, generator=generator).exp() for _ in range(2))
    folder = tmp_path_factory.mktemp("choice")
    weight = rows(seed + 1, 48, columns)
    chosen = fit(scales, weight, folder / "a", method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_quantizer, "ALPHAS", ())
        off = fit(scales, weight, folder / "b", method)
    assert chosen[1] == off[1] if chosen[0] is None else chosen[1] > off[1] + 0.8


def test_what_chance_gains_is_no_gain(tmp_path: Path) -> None:
    """Channels that differ only in the extremes of the samples."""
    alpha, _ = fit(torch.ones(64), rows(2, 96, torch.ones(64)), tmp_path / "a", "gptq")
    assert alpha is None


def test_equal_channels_are_left_alone(tmp_path: Path) -> None:
    observer = Observer(None, lambda _: torch.eye(32), None, "cpu", W8A8)  # type: ignore[arg-type]
    observer.linear(torch.cat([torch.eye(32), -torch.eye(32)]), LINEAR)
    norm = {f"{NORM}.weight": torch.full((32,), 3.0), f"{NORM}.bias": torch.ones(32)}
    given = {f"{LINEAR}.weight": torch.eye(32), **norm}
    store = WeightStore(tmp_path, W8A8)
    (report,) = LayerQuantizer(W8A8, "rtn", given.__getitem__, store).quantize(observer)
    assert report.equalisation is None
    for part in ("weight", "bias"):
        np.testing.assert_array_equal(store.parameter(f"{NORM}.{part}"), given[f"{NORM}.{part}"].numpy())


# Through the real command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder, 9)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with some channels of its vision norms 50 times as large."""
    config = replace(TINY, vision=replace(TINY.vision, patch_size=24))
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "FUSION-tiny", config)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, values in tensors.items():
            if name.startswith(f"{VISION_MODEL}encoder.layers.") and "layer_norm" in name and name.endswith(".weight"):
                values[[3, 17]] *= 50
        save_file(tensors, file)
    return folder


def arguments(checkpoint: Path, data: Path, output: Path) -> list[str]:
    exact = "--group-size", "32", "--accuracy-level", "0", "--rule", "vision.*projector*=int8"
    return [str(checkpoint), "-o", str(output), "--calibrate", str(data), *exact]


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "bundle"
    assert cli.main(arguments(checkpoint, data, output)) == 0
    return output


def report(bundle: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((bundle / QUANTIZATION).read_text(encoding="utf-8"))
    return facts


def test_it_is_reported_and_brings_the_bundle_closer(
    checkpoint: Path, data: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_quantizer, "ALPHAS", ())
    assert cli.main(arguments(checkpoint, data, tmp_path / "b")) == 0
    facts, off = report(calibrated), report(tmp_path / "b")
    chosen = {linear["name"] for linear in facts["linears"] if linear["equalisation"] is not None}
    assert {f"vision.layers.{i}.{name}" for i in (0, 1) for name in ("attention.qkv", "mlp.up")} <= chosen
    assert all(linear["equalisation"] is None for linear in off["linears"])
    loss, loss_without = (1 - part["end_to_end"]["cosine"]["vision_encoder"] for part in (facts, off))
    assert loss < loss_without / 2


def test_the_bundle_computes_what_was_calibrated(checkpoint: Path, data: Path, calibrated: Path) -> None:
    """ONNX Runtime and the eager interpreter agree on the smoothed norms of the bundle."""
    assert_computes_its_weights(calibrated, data / "00000.png")


@pytest.mark.parametrize("number", [0, 3, 5, 9])
def test_a_killed_run_goes_on(
    checkpoint: Path, data: Path, calibrated: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a number of smoothed parameters, five per layer, before their linear is saved."""
    saved = 0
    save = WeightStore.save_parameter

    class Killed(BaseException):
        pass

    def killed(self: WeightStore, *more: Any) -> None:
        nonlocal saved
        save(self, *more)
        saved += 1
        if saved > number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WeightStore, "save_parameter", killed)
        with pytest.raises(Killed):
            cli.main(arguments(checkpoint, data, tmp_path / "b"))
    assert cli.main(arguments(checkpoint, data, tmp_path / "b")) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == {
        path.name: path.read_bytes() for path in calibrated.iterdir()
    }


def test_one_thread_at_a_time_reads_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of Python 3.11 need it."""
    store, reading, load_file = WeightStore(tmp_path, W8A8), Lock(), np.load
    store.save_parameter("norm.weight", np.ones(8, np.float32))
    store.save(LINEAR, [round_to_nearest(torch.ones(4, 8), W8A8[LINEAR])])

    def load_alone(*arguments: Any, **options: Any) -> Any:
        assert reading.acquire(blocking=False)
        try:
            time.sleep(0.001)
            return load_file(*arguments, **options)
        finally:
            reading.release()

    monkeypatch.setattr(np, "load", load_alone)
    with ThreadPoolExecutor(8) as pool:
        parameters = list(pool.map(store.parameter, ["norm.weight", "norm.bias"] * 8))
        rows = list(pool.map(partial(store.rows, LINEAR, 0), range(5)))
    assert sum(values is not None for values in parameters) == 8
    assert [len(packed.values) for packed in rows] == list(range(5))


@pytest.mark.parametrize("lost", ["attention_norm.weight", "mlp_norm.bias", "attention.qkv.bias"])
def test_lost_parameters_of_a_finished_block(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Any, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    propagate = run.CalibrationRun._propagate

    def killed(self: Any, i: int, *more: Any) -> None:
        if i == 1:
            raise Killed
        propagate(self, i, *more)

    with monkeypatch.context() as patch:
        patch.setattr(run.CalibrationRun, "_propagate", killed)
        with pytest.raises(Killed):
            cli.main(arguments(checkpoint, data, tmp_path / "b"))
    (tmp_path / ".b.calibration" / f"vision.layers.0.{lost}.npy").unlink()
    assert "lost files" in refused(cli.main, *arguments(checkpoint, data, tmp_path / "b"))
