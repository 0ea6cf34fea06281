"""Comparison of vision encoders. Measurements of other engines need the engines."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import TINY, write_checkpoint

from fusion_edge.benchmarks.peers import __main__ as peers
from fusion_edge.benchmarks.peers import export_vision
from fusion_edge.benchmarks.peers.runners import bundle_vision, openvino_vision, torch_vision, vision, worker
from fusion_edge.benchmarks.peers.runners.bundle_tier import choose_tier
from fusion_edge.benchmarks.peers.runners.bundle_vision import BundleEncoder
from fusion_edge.benchmarks.vision_module import GlobalCrops, LocalCrop, read_vision
from fusion_edge.export.bundle.writer import write_bundle
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.export.planning.rules import Rule
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.bundle.config import GLOBAL_CROPS, IMAGE_SIZE
from fusion_edge.runtime.bundle.graphs import VISION_ENCODER
from fusion_edge.runtime.bundle.reader import open_bundle

WORK = vision.VisionWorkload(question_tokens=3, threads=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vision") / "FUSION-tiny", TINY)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """With the vision encoder in float32."""
    folder = checkpoint.parent / "bundle"
    with Checkpoint(checkpoint) as opened:
        rules = (Rule.parse("vision.*=fp32", None),)
        write_bundle(plan_export(opened, ExportOptions(precision="int4", rules=rules)), folder, False)
    return folder


def test_workload_is_an_image() -> None:
    assert vision.IMAGE_SIZE == IMAGE_SIZE
    assert vision.VisionWorkload().crops == GLOBAL_CROPS


@torch.inference_mode()
def test_torch_modules_match_a_bundle(checkpoint: Path, bundle: Path) -> None:
    config, parameters = read_vision(checkpoint, torch.float32)
    ours = BundleEncoder(bundle, WORK, {})
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (2, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    text = random.normal(0, 1, (1, WORK.question_tokens, ours.hidden_size)).astype(np.float32)
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    theirs = GlobalCrops(config, parameters)(torch.from_numpy(pixels))
    np.testing.assert_allclose(ours.encode_global(pixels), theirs, rtol=1e-4, atol=1e-4)
    theirs = LocalCrop(config, parameters)(torch.from_numpy(pixels[:1]), torch.from_numpy(text), mask)
    np.testing.assert_allclose(ours.encode_local(pixels[:1], text), theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours.encode_global(pixels[:1]) - theirs.numpy()).max() > 1e-2  # the question matters


def test_timed_calls(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    class Watched(BundleEncoder):
        def encode_local(self, pixels: Any, text: Any) -> Any:
            calls.append((*pixels.shape[:1], *text.shape))
            return super().encode_local(pixels, text)

    measured = vision.measure(Watched, bundle, WORK, {})
    width = TINY.language.hidden_size
    assert calls == 2 * [(4, 4, 0, width), (1, 1, 3, width)]
    figures = measured.figures
    assert figures.image_seconds == pytest.approx(figures.global_seconds + figures.local_seconds)
    assert measured.settings == {"formats": ["fp32"], "tier": None, "threads": 1}


def test_bundle_and_torch_harness(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    arguments = ["vision", f"--bundle=ours={bundle}", f"--torch=pytorch={checkpoint}", "--rounds=1", "--threads=1"]
    assert peers.main([*arguments, f"--json={path}"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["global", "ours", "pytorch"]
    contestants = json.loads(path.read_text())["contestants"]
    assert contestants["pytorch: bf16"]["settings"] == {"dtype": "bf16", "threads": 1}
    assert contestants["pytorch: f32"]["settings"] == {"dtype": "f32", "threads": 1}
    assert contestants["ours"]["figures"]["image_seconds"]["p50"] > 0


def test_wrong_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for measure in (bundle_vision.measure, torch_vision.measure):
        assert (
            worker.report(measure, vision.VisionWorkload, (), [str(tmp_path / "nowhere"), "{}", '{"dtype": "bf16"}'])
            == 1
        )
        assert "nowhere" in capsys.readouterr().err


def test_missing_openvino_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        Core = object

    monkeypatch.setattr(openvino_vision, "import_engine", lambda module, package: Peer)
    with pytest.raises(worker.CannotRunError, match=r"local\.xml is missing"):
        openvino_vision.OpenVinoEncoder(tmp_path, WORK, {})


def test_a_bundle_runs_on_the_tier_of_the_instruction_set(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    def use_tier(name: str) -> bool:
        chosen.append(name)
        return name != "AVX2"

    monkeypatch.setattr(cpu_kernels, "can_run", lambda manifest, graph: True)
    monkeypatch.setattr(cpu_kernels, "tier", lambda: "AMX")
    monkeypatch.setattr(cpu_kernels, "use_tier", use_tier)
    manifest = open_bundle(bundle).manifest
    assert choose_tier(manifest, VISION_ENCODER, None) == "AMX"
    assert choose_tier(manifest, VISION_ENCODER, "avx512_vnni") == "AVX-512 VNNI"
    assert choose_tier(manifest, VISION_ENCODER, "avx_vnni") == "AVX-VNNI"
    with pytest.raises(worker.CannotRunError, match="do not run vision_encoder with AVX2 here; see fusion-info"):
        choose_tier(manifest, VISION_ENCODER, "avx2")
    assert chosen == ["AVX-512 VNNI", "AVX-VNNI", "AVX2"]


def test_without_our_kernels_no_instruction_set_is_held(bundle: Path) -> None:
    with pytest.raises(worker.CannotRunError, match="do not run vision_encoder"):
        BundleEncoder(bundle, dataclasses.replace(WORK, isa="avx512_vnni"), {})


def test_integer_bundle(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8"
    assert export_vision.main(["bundle-int8", f"--checkpoint={checkpoint}", f"--output={output}"]) == 0
    assert BundleEncoder(output, WORK, {}).settings["formats"] == ["w8a8"]


def test_missing_package_and_existing_output_are_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["openvino-int8", f"--checkpoint={checkpoint}"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert export_vision.main([*arguments, f"--output={tmp_path / 'new'}"]) == 1
    assert "openvino cannot be imported" in capsys.readouterr().err
    monkeypatch.setattr(export_vision, "_import", lambda package: None)
    assert export_vision.main([*arguments, f"--output={tmp_path}"]) == 1
    assert "exists; choose another --output" in capsys.readouterr().err
