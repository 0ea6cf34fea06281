"""Bit allocation in an export: sensitivities, budgets, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import TINY, write_checkpoint
from support.logits import first_logits
from support.parity import assert_computes_its_weights

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration import sensitivity
from fusion_edge.export.calibration.bit_budget import budget_ranges, candidates
from fusion_edge.export.calibration.sensitivity import measure_sensitivity
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.export.planning.rules import Rule
from fusion_edge.export.reference.eager_backend import EagerBackend, open_checkpoint
from fusion_edge.quant.bit_allocation import mean_bits
from fusion_edge.quant.formats import WeightFormat
from fusion_edge.quant.gptq import round_to_nearest
from fusion_edge.runtime.bundle.manifest import QUANTIZATION
from fusion_edge.runtime.bundle.quantization_report import QuantizationReport
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.samples import Sample

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "FUSION-tiny", TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder, 9)
    return folder


def arguments(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    base = [str(checkpoint), "-o", str(output), "--group-size", "32", "--calibrate", str(data), "--vision", "fp16"]
    return [*base, *more]


# The measurement -----------------------------------------------------------------------------------------------


def test_sensitivity_matches_model_with_one_quantized_linear(checkpoint: Path, tmp_path: Path) -> None:
    name, question = "llm.layers.0.mlp.down", "How many?"
    write_samples(tmp_path, 8)
    picture = tmp_path / "00000.png"
    with Checkpoint(checkpoint) as opened:
        plan = plan_export(opened, ExportOptions(group_size=32))
        found = measure_sensitivity(plan, [name], [Sample(picture, question)], "cpu", tmp_path)
    with open_checkpoint(checkpoint) as fusion:
        backend = fusion.backend
        assert isinstance(backend, EagerBackend)
        exact = torch.from_numpy(first_logits(fusion, picture, question))
        with torch.inference_mode():
            weight = backend.parameter(f"{name}.weight")
            weight.copy_(round_to_nearest(weight, WeightFormat("int4", 32)).values)
        rounded = torch.from_numpy(first_logits(fusion, picture, question))
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (exact, rounded))
    expected = float((p.exp() * (p - q)).sum())
    assert expected > 0
    assert [s.name for s in found] == [name]
    assert found[0].kl_divergence == pytest.approx(expected, rel=1e-2)
    assert 5 < found[0].output_sqnr < 40


def test_candidates_are_4_bit_linears_without_a_rule(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as opened:
        rule = Rule("llm.layers.0.*", WeightFormat("int4", 32))
        plan = plan_export(opened, ExportOptions(group_size=32, rules=(rule,)))
        names = candidates(plan)
        assert budget_ranges(plan_export(opened, ExportOptions(precision="int8"))) == {}
    assert "llm.layers.1.mlp.down" in names
    assert "alignment.layers.0.context" in names
    assert not any(name.startswith(("llm.layers.0", "vision.", "llm.lm_head", "llm.embed")) for name in names)


# The bundle ----------------------------------------------------------------------------------------------------


def test_mean_bits_stay_within_limit(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    assert cli.main(arguments(checkpoint, data, output, "--bits", "6", "--accuracy-level", "0")) == 0
    report = QuantizationReport.read(output / QUANTIZATION)
    weights = open_bundle(output).manifest.weights
    allocation = report.mixed_precision
    assert allocation is not None
    assert {name for name, fmt in weights.items() if fmt == "int8:32"} == {
        *allocation.raised,
        "llm.lm_head",
        "llm.embed_tokens",
    }
    assert len(allocation.sensitivities) > len(allocation.raised) > 0
    with Checkpoint(checkpoint) as opened:
        shapes = candidates(plan_export(opened, ExportOptions(group_size=32, vision="fp16")))
    assert set(shapes) == {s.name for s in allocation.sensitivities}
    bits = mean_bits(shapes, {name: WeightFormat.parse(weights[name]) for name in shapes})
    assert bits == pytest.approx(allocation.bits, abs=1e-4)
    assert 5 < bits <= 6
    assert "Bit allocation" in capsys.readouterr().out
    assert cli_info.main([str(output)]) == 0
    assert f"{len(allocation.raised)} of {len(shapes)} linears promoted to INT8" in capsys.readouterr().out
    assert_computes_its_weights(output, data / "00000.png")


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_bundle_fits_budget(checkpoint: Path, data: Path, tmp_path: Path, share: float) -> None:
    with Checkpoint(checkpoint) as opened:
        least, most = budget_ranges(plan_export(opened, ExportOptions(group_size=32, vision="fp16")))["--budget"]
    budget = int(least + share * (most - least))
    output = tmp_path / "bundle"
    assert cli.main(arguments(checkpoint, data, output, "--budget", str(budget), "--method", "rtn")) == 0
    bundle = open_bundle(output)
    assert budget - 0.1 * (most - least) - least * 0.1 < bundle.manifest.size <= budget
    report = json.loads((output / QUANTIZATION).read_text(encoding="utf-8"))["mixed_precision"]
    assert report["raised"]
    assert (len(report["raised"]) == len(report["sensitivities"])) == (share == 1)


def test_killed_measurement_resumes(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    more = "--bits", "5.5"
    assert cli.main(arguments(checkpoint, data, tmp_path / "whole", *more)) == 0
    measured: list[str] = []
    original = sensitivity.SensitivityMeasurement._measure

    def killed(self: Any, i: int, names: list[str], *inputs: Any) -> Any:
        if len(measured) == 1:
            raise Killed
        measured.append(names[0])
        return original(self, i, names, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity.SensitivityMeasurement, "_measure", killed)
        with pytest.raises(Killed):
            cli.main(arguments(checkpoint, data, tmp_path / "b", *more))

    def once(self: Any, i: int, names: list[str], *inputs: Any) -> Any:
        assert names[0] not in measured
        return original(self, i, names, *inputs)

    monkeypatch.setattr(sensitivity.SensitivityMeasurement, "_measure", once)
    assert cli.main(arguments(checkpoint, data, tmp_path / "b", *more)) == 0
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("b", "whole")]
    assert files[0] == files[1]


# Refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--bits", "4"], "--bits is too small: the minimum is 4.500"),
        (["--budget", "100kB"], "--budget is too small: the minimum is"),
        (["--int8", "--bits", "5"], "--int4"),
        (["--sensitivity-samples", "3"], "--budget or --bits"),
    ],
)
def test_invalid_budgets(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, more: list[str], expected: str
) -> None:
    message = refused(cli.main, *arguments(checkpoint, data, tmp_path / "b", *more), code=2)
    assert expected in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--budget", "--bits"])
def test_budget_requires_calibration_data(checkpoint: Path, tmp_path: Path, refused: Refused, option: str) -> None:
    message = refused(cli.main, checkpoint, "-o", tmp_path / "b", option, "5", code=2)
    assert option in message
    assert "--calibrate" in message


def test_dry_run_prints_budget_ranges(checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(checkpoint), "--group-size", "32", "--calibrate", str(data), "--dry-run"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "--budget can be" in text
    assert "--bits can be" in text
    assert cli.main([*command, "--json"]) == 0
    least, most = json.loads(capsys.readouterr().out)["ranges"]["--bits"]
    assert 4 < least < 8 < most
