"""Estimated cost of a calibration: memory, disk and time grow with the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import TINY, write_checkpoint
from support.prequantized_checkpoints import SMALL, packer, read_fixture, write_quantized

from fusion_edge.export.calibration import estimate
from fusion_edge.export.calibration.estimate import CalibrationEstimate, estimate_calibration
from fusion_edge.export.calibration.options import CalibrationOptions
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export

OPTIONS = CalibrationOptions(Path("samples"))


@pytest.fixture(autouse=True)
def _throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_throughput", lambda device: 1e9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(SMALL, vision=replace(TINY.vision, patch_size=24))
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "FUSION-small", config)


def estimated(
    checkpoint: Path, calibration: CalibrationOptions = OPTIONS, precision: str = "int4", vision: str = "fp16"
) -> CalibrationEstimate:
    with Checkpoint(checkpoint) as opened:
        return estimate_calibration(plan_export(opened, ExportOptions(precision, vision=vision)), calibration)


def test_float_weights_need_no_hessian_and_no_disk(checkpoint: Path) -> None:
    less, more = (estimated(checkpoint, vision=vision) for vision in ("fp16", "int8-weights"))
    assert less.memory < more.memory
    assert less.disk < more.disk
    assert less.seconds < more.seconds


def test_prequantized_weights_need_no_hessian_and_no_disk(tmp_path: Path) -> None:
    fixture = read_fixture("gptq-v1-sym")
    packed = write_quantized(tmp_path / "packed", fixture.config, fixture.tensors, packer("gptq-v1-sym"))
    less, more = (estimated(folder) for folder in (packed, write_checkpoint(tmp_path / "float", SMALL)))
    assert less.disk < more.disk
    assert less.seconds < more.seconds


def test_codebooks_need_no_gptq_time(checkpoint: Path) -> None:
    assert estimated(checkpoint, precision="nf4").seconds < estimated(checkpoint).seconds


def test_sensitivity_cost_grows_with_samples(checkpoint: Path) -> None:
    without = estimated(checkpoint)
    few, many, all_there_are = (
        estimated(checkpoint, replace(OPTIONS, bits=6.0, samples=3000, sensitivity_samples=count))
        for count in (1000, 3000, 4000)
    )
    assert without.memory < few.memory < many.memory
    assert without.seconds < few.seconds < many.seconds
    assert many == all_there_are
    assert estimated(checkpoint, replace(OPTIONS, samples=3000)).memory == without.memory
