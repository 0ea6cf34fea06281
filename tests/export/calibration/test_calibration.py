"""Calibration through the commands: the bundle, resuming after a kill, and errors."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.checkpoints import TINY, write_checkpoint
from support.parity import assert_computes_its_weights

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration import float_model, run
from fusion_edge.export.calibration.blocks import blocks
from fusion_edge.export.calibration.layer_quantizer import LayerQuantizer
from fusion_edge.export.calibration.weight_store import WeightStore
from fusion_edge.export.calibration.work_folder import work_folder
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.runtime.bundle.files import digest
from fusion_edge.runtime.bundle.manifest import MANIFEST, QUANTIZATION, graph_file
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info

COUNT = 9
Refused = Callable[..., str]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with patches of 24 pixels: Hessians are small."""
    config = replace(TINY, vision=replace(TINY.vision, patch_size=24))
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "FUSION-tiny", config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples of the demo's task."""
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, calibrated in one go. Read it only."""
    output = tmp_path_factory.mktemp("calibrated") / "bundle"
    assert cli.main(arguments(checkpoint, data, output)) == 0
    return output


def arguments(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [str(checkpoint), "-o", str(output), "--int4", "--group-size", "32", "--calibrate", str(data), *more]


def content(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


# The bundle ----------------------------------------------------------------------------------------------------


def test_report_matches_bundle(calibrated: Path) -> None:
    bundle = open_bundle(calibrated)
    report = json.loads((calibrated / QUANTIZATION).read_text(encoding="utf-8"))
    methods = {linear["name"]: linear["method"] for linear in report["linears"]}
    assert set(methods) == {name for name, fmt in bundle.manifest.weights.items() if fmt != "fp16"}
    assert {name for name, method in methods.items() if method == "rtn"} == {"llm.embed_tokens"}
    assert report["calibration_samples"] == COUNT - 1
    assert set(report["end_to_end"]["cosine"]) == {"vision_encoder", "alignment_decoder", "llm"}
    assert not list(calibrated.parent.glob(".*"))


@pytest.mark.parametrize("more", [(), ("--asym",)])
def test_graphs_use_calibrated_weights(checkpoint: Path, data: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    output = tmp_path / "bundle"
    assert cli.main(arguments(checkpoint, data, output, "--accuracy-level", "0", *more)) == 0
    assert_computes_its_weights(output, data / "00000.png")


def test_output_error_is_below_round_to_nearest(checkpoint: Path, data: Path, calibrated: Path, tmp_path: Path) -> None:
    assert cli.main(arguments(checkpoint, data, tmp_path / "b", "--method", "rtn")) == 0

    def errors(folder: Path) -> dict[str, float]:
        report = json.loads((folder / QUANTIZATION).read_text(encoding="utf-8"))
        return {linear["name"]: linear["output_sqnr"] for linear in report["linears"] if linear["output_sqnr"]}

    gptq, rounded = errors(calibrated), errors(tmp_path / "b")
    gains = [gptq[name] - rounded[name] for name in gptq if name.startswith(("llm.layers", "alignment"))]
    assert np.median(gains) > 1


# Killed --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """A kill, which no handler catches."""


@pytest.mark.parametrize(
    ("owner", "stage"), [(LayerQuantizer, "_quantize_rows"), (WeightStore, "save"), (run.CalibrationRun, "_propagate")]
)
@pytest.mark.parametrize("number", [0, 3, 6])
def test_killed_run_resumes(
    checkpoint: Path,
    data: Path,
    calibrated: Path,
    tmp_path: Path,
    owner: type,
    stage: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, calls = tmp_path / "bundle", 0
    original = getattr(owner, stage)

    def killed(*inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > number:
            raise Killed
        return original(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, stage, killed)
        with pytest.raises(Killed):
            cli.main(arguments(checkpoint, data, output))
    assert not output.exists()
    observed: list[str] = []
    quantize = run.CalibrationRun._quantize

    def counted(self: Any, block: Any, *more: Any) -> None:
        observed.append(block.name)
        quantize(self, block, *more)

    monkeypatch.setattr(run.CalibrationRun, "_quantize", counted)
    assert cli.main(arguments(checkpoint, data, output)) == 0
    assert content(output) == content(calibrated)
    if stage == "_propagate":
        assert len(observed) == len(blocks(open_bundle(output).manifest.model)) - number - 1
    assert not list(tmp_path.glob(".*"))


def test_different_command_restarts(
    checkpoint: Path, data: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run.CalibrationRun, "_propagate", killed)
        with pytest.raises(Killed):
            cli.main(arguments(checkpoint, data, output, "--method", "rtn"))
    assert cli.main(arguments(checkpoint, data, output)) == 0
    assert content(output) == content(calibrated)


# Refused -------------------------------------------------------------------------------------------------------


def test_accuracy_drop_above_limit(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(cli.main, *arguments(checkpoint, data, tmp_path / "b", "--max-accuracy-drop", "-1"), code=6)
    assert "more than -1" in message
    assert "--rule" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--samples", "8"], "--samples"),
        (["--method", "gptq"], "--method"),
        (["--max-accuracy-drop", "1"], "--max-accuracy-drop"),
    ],
)
def test_calibration_options_require_calibrate(
    checkpoint: Path, tmp_path: Path, refused: Refused, more: list[str], expected: str
) -> None:
    message = refused(cli.main, checkpoint, "-o", tmp_path / "b", *more, code=2)
    assert expected in message
    assert "--calibrate" in message


@pytest.mark.parametrize(
    ("options", "chosen"),
    [(["--fp16"], "with --fp16 there"), (["--rule", "*=fp16"], "with --int4 and these rules there")],
)
def test_no_weights_to_quantize(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, options: list[str], chosen: str
) -> None:
    assert chosen in refused(cli.main, checkpoint, "-o", tmp_path / "b", *options, "--calibrate", data, code=2)


def test_output_is_checked_before_calibration(
    checkpoint: Path, data: Path, calibrated: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.CalibrationRun, "run", None)
    assert "--force" in refused(cli.main, *arguments(checkpoint, data, calibrated))


def test_non_finite_activations(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weights: CheckpointWeights, name: str) -> np.ndarray[Any, Any]:
        values = np.array(read_parameter(weights, name))
        return np.full_like(values, 3e38) if name == "llm.layers.0.mlp_norm.weight" else values

    monkeypatch.setattr(float_model, "read_parameter", broken)
    message = refused(cli.main, *arguments(checkpoint, data, tmp_path / "b"))
    assert "llm.layers.0.mlp" in message
    assert not (tmp_path / "b").exists()


def test_out_of_memory(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: Any) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(run.CalibrationRun, "run_block", allocate)
    assert "not enough memory" in refused(cli.main, *arguments(checkpoint, data, tmp_path / "b"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_no_gpu(checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, more: tuple[str, ...]) -> None:
    message = refused(cli.main, *arguments(checkpoint, data, tmp_path / "b", "--device", "cuda", *more))
    assert "--device cpu" in message


def test_sample_longer_than_context(checkpoint: Path, data: Path, tmp_path: Path, refused: Refused) -> None:
    lines = [{"image": str(data / "00000.png"), "question": "why " * (300 if i == 5 else 1)} for i in range(9)]
    (tmp_path / "s.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    message = refused(cli.main, *arguments(checkpoint, tmp_path / "s.jsonl", tmp_path / "b"))
    assert "context" in message
    assert "00000.png" in message


def test_finished_block_without_its_weights(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run.CalibrationRun, "_propagate", killed)
        with pytest.raises(Killed):
            cli.main(arguments(checkpoint, data, tmp_path / "b"))
    (tmp_path / ".b.calibration" / "vision.text_projector.up.scales.npy").unlink()
    assert "lost files" in refused(cli.main, *arguments(checkpoint, data, tmp_path / "b"))


def test_partly_cleared_work_folder_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_file() -> None:
        with work_folder(tmp_path / "b", "one") as folder:
            (folder / "left.json").write_text("of one", encoding="utf-8")
            raise Killed

    with pytest.raises(Killed):
        leave_file()

    def killed(path: str, *, dir_fd: int) -> None:
        if path != "command.json":  # the first file behind the command's
            raise Killed
        os.rename(path, tmp_path / "away", src_dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        with pytest.raises(Killed), work_folder(tmp_path / "b", "two"):
            pass
    with work_folder(tmp_path / "b", "one") as folder:
        assert not (folder / "left.json").exists()


@pytest.mark.parametrize("points", ["nan", "inf", "much"])
def test_accuracy_limit_must_be_finite(checkpoint: Path, data: Path, tmp_path: Path, points: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments(checkpoint, data, tmp_path / "b", "--max-accuracy-drop", points))
    assert caught.value.code == 2


def test_one_calibration_at_a_time(checkpoint: Path, data: Path, tmp_path: Path, refused: Refused) -> None:
    with work_folder(tmp_path / "b", "another"):
        assert "Another calibration" in refused(cli.main, *arguments(checkpoint, data, tmp_path / "b"))


def test_disk_too_small(
    checkpoint: Path, data: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "GB free" in refused(cli.main, *arguments(checkpoint, data, tmp_path / "b"))
    assert not list(tmp_path.iterdir())


# Vision encoder ----------------------------------------------------------------------------------------------------


def test_vision_encoder_uses_integer_gemm(calibrated: Path, tmp_path: Path) -> None:
    """ONNX Runtime must recognize the pattern, or it would be slower than float."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(calibrated / graph_file("vision_encoder"), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    formats = open_bundle(calibrated).manifest.weights
    assert kinds["MatMulIntegerToFloat"] == sum(fmt == "w8a8" for fmt in formats.values()) > 0
    assert kinds["DequantizeLinear"] == 0
    weights_alone = [node for node in optimized.graph.node if node.op_type == "MatMulNBits"]
    assert [node.input[1] for node in weights_alone] == ["vision.projector.down.weight"]


@pytest.mark.parametrize("vision", ["int8-weights", "fp16"])
def test_vision_formats_without_calibration(checkpoint: Path, tmp_path: Path, vision: str) -> None:
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "b"), "--vision", vision]) == 0
    formats = {fmt for name, fmt in open_bundle(tmp_path / "b").manifest.weights.items() if name.startswith("vision.")}
    assert formats == {{"int8-weights": "int8:128"}.get(vision, vision)}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--vision", "int8"], "--calibrate"),
        (["--rule", "vision.layers.0.mlp.up=w8a8"], "--calibrate"),
        (["--fp16", "--vision", "int8"], "leave it out"),
        (["--int8", "--asym"], "leave it out"),
        (["--rule", "llm.embed_tokens=w8a8"], "looked up by row"),
    ],
)
def test_unsupported_formats(
    checkpoint: Path, tmp_path: Path, refused: Refused, more: list[str], expected: str
) -> None:
    assert expected in refused(cli.main, checkpoint, "-o", tmp_path / "b", *more, code=2)


def test_w8a8_is_rejected_for_cuda(checkpoint: Path, data: Path, tmp_path: Path, refused: Refused) -> None:
    more = "--target", "cuda", "--vision", "int8"
    message = refused(cli.main, *arguments(checkpoint, data, tmp_path / "b", *more), code=2)
    assert "does not run on --target cuda; use int8" in message


def test_dry_run_prints_calibration_cost(checkpoint: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    command = [str(checkpoint), "--calibrate", str(data), "--dry-run"]
    assert cli.main(command) == 0
    assert "Calibration" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    effort = json.loads(capsys.readouterr().out)["calibration"]
    assert effort["memory"] > 0
    assert effort["disk"] > 0
    assert cli.main([*command, "--json", "--samples", "7", "--held-out", "1"]) == 0
    less = json.loads(capsys.readouterr().out)["calibration"]
    assert less["memory"] == effort["memory"]
    assert less["disk"] < effort["disk"]


def test_json_includes_seconds(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "b"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["quantization"]
    kept = json.loads((tmp_path / "b" / QUANTIZATION).read_text(encoding="utf-8"))
    assert all(linear.pop("seconds") >= 0 for linear in printed["linears"])
    assert printed == kept


def test_info_prints_calibration_report(calibrated: Path, capsys: Captured) -> None:
    assert cli_info.main([str(calibrated)]) == 0
    text = capsys.readouterr().out
    assert f"1 by rtn; {COUNT - 1} calibration samples" in text
    assert "Top-1 agreement" in text


def test_invalid_quantization_report(calibrated: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(calibrated, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text(encoding="utf-8"))
    path = tmp_path / "b" / QUANTIZATION
    path.write_text("{}", encoding="utf-8")
    for entry in manifest["files"]:
        if entry["path"] == QUANTIZATION:
            entry |= {"size": 2, "sha256": digest(path)}
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert "not a quantization report" in refused(cli_info.main, tmp_path / "b")
