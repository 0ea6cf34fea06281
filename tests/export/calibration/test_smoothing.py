"""SmoothQuant in calibration: the error never increases, and smoothed parameters are saved and resumed."""

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
from support.channels import OUTLIERS, outliers, rows
from support.checkpoints import TINY, write_checkpoint
from support.parity import assert_computes_its_weights
from torch import Tensor

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration import layer_quantizer, run
from fusion_edge.export.calibration.layer_quantizer import LayerQuantizer
from fusion_edge.export.calibration.observer import Observer
from fusion_edge.export.calibration.weight_store import WeightStore
from fusion_edge.export.checkpoint.tensor_mapping import VISION_MODEL
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.gptq import round_to_nearest
from fusion_edge.quant.observer import fake_quantize
from fusion_edge.runtime.bundle.manifest import QUANTIZATION

LINEAR, NORM = "vision.layers.0.mlp.up", "vision.layers.0.mlp_norm"
W8A8 = {LINEAR: WeightFormat("w8a8")}


# The choice --------------------------------------------------------------------------------------------------------


def calibrate(
    scales: Tensor, weight: Tensor, folder: Path, method: str, measured: Tensor | None = None
) -> tuple[float | None, float]:
    """Calibrate a linear with inputs of the given channel scales. Returns the chosen alpha and the output SQNR.

    The SQNR is measured on the same inputs, or on ``measured``.
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
    alpha, smoothed = calibrate(outliers(64), weight, tmp_path / "smoothed", method, others)
    monkeypatch.setattr(layer_quantizer, "ALPHAS", ())
    nothing, unsmoothed = calibrate(outliers(64), weight, tmp_path / "off", method, others)
    assert nothing is None
    assert alpha is not None
    assert smoothed > unsmoothed + (3 if weight_scales[OUTLIERS[0]] == 1 else 20)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_smoothing_never_increases_error(method: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales, columns = (torch.randn(64, generator=generator).exp() for _ in range(2))
    folder = tmp_path_factory.mktemp("choice")
    weight = rows(seed + 1, 48, columns)
    chosen = calibrate(scales, weight, folder / "a", method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_quantizer, "ALPHAS", ())
        off = calibrate(scales, weight, folder / "b", method)
    assert chosen[1] == off[1] if chosen[0] is None else chosen[1] > off[1] + 0.8


def test_small_gains_do_not_enable_smoothing(tmp_path: Path) -> None:
    """Channels differ only in the extremes of the samples."""
    alpha, _ = calibrate(torch.ones(64), rows(2, 96, torch.ones(64)), tmp_path / "a", "gptq")
    assert alpha is None


def test_equal_channels_are_not_smoothed(tmp_path: Path) -> None:
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


def test_smoothing_is_reported_and_reduces_error(
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


def test_bundle_computes_with_calibrated_weights(checkpoint: Path, data: Path, calibrated: Path) -> None:
    """ONNX Runtime and the eager interpreter agree on the smoothed norms of the bundle."""
    assert_computes_its_weights(calibrated, data / "00000.png")


@pytest.mark.parametrize("number", [0, 3, 5, 9])
def test_killed_run_resumes(
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


def test_one_thread_at_a_time_reads_npy_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_finished_block_without_its_parameters(
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
