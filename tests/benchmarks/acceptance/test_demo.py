"""The steps of the demo model and of the full size, on fakes of TensorRT and CUDA."""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, FakeTensorRT
from fakes.on_fake_tensorrt import installed
from support.demo_model import ANSWER, PICTURE, QUESTION
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks import full_size_checkpoint
from fusion_edge.benchmarks.acceptance import bundles, demo, full_size
from fusion_edge.benchmarks.acceptance.engine import BuiltEngine, EngineRun
from fusion_edge.benchmarks.acceptance.steps import SkippedStep, Workspace
from fusion_edge.export.engines import engine_check
from fusion_edge.export.engines.stage_outputs import StageOutputs
from fusion_edge.runtime.backends import devices
from fusion_edge.runtime.backends.onnxruntime import library
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.jetson import Jetson

pytestmark = needs_opset_24  # the fake of TensorRT computes with it


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    return Workspace(tmp_path / "output", tmp_path / "scratch", None, None)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    """A machine with TensorRT and a GPU; afterwards all its memory is free."""
    trt = FakeTensorRT(*FULL, FakeCuda())
    monkeypatch.setattr(devices, "_no_nvidia_gpu", lambda: None)
    with installed(trt):
        yield trt
    trt.cuda.check_all_freed()


@pytest.fixture
def exported(workspace: Workspace) -> Workspace:
    demo.export(workspace)
    return workspace


def test_the_demo_model_on_fakes(exported: Workspace, trt: FakeTensorRT) -> None:
    assert (demo.QUESTION, demo.ANSWER, demo.picture_of(exported).resolve()) == (QUESTION, ANSWER, PICTURE)
    assert demo.answer_on_cpu(exported).figures == {"answer": ANSWER}
    built = demo.build(exported, plugins=False)
    assert built.figures["engines"] > 0
    launches = {}
    for graphs in (True, False):
        trt.cuda.calls.clear()
        outcome = demo.run(exported, graphs)
        assert outcome.figures["answer"] == ANSWER
        assert outcome.figures["decode_step"] > 0
        assert [one["stage"] for one in outcome.figures["differences"]][-1] == "prefill in a scene"
        assert all(one["relative_error"] < one["limit"] / 4 for one in outcome.figures["differences"])
        launches[graphs] = trt.cuda.calls.count("cudaGraphLaunch")
    assert launches[True] > demo.STEPS
    assert launches[False] == 0
    kept = exported.scratch / demo.CPU_OUTPUTS
    outputs = StageOutputs.load(kept)
    dataclasses.replace(outputs, steps=outputs.steps[::-1]).save(kept)
    with pytest.raises(FusionError, match=" are wrong in decode step: they differ from the CPU by more than rounding "):
        demo.run(exported, graphs=True)
    kept.unlink()
    with pytest.raises(FusionError, match="no outputs of the CPU to compare with: step demo-cpu failed"):
        demo.run(exported, graphs=True)
    figures = demo.cancel(exported).figures
    assert figures.keys() == {"prefill", "decode step"}
    assert all(0 < seconds < 5 for seconds in figures.values())


def test_a_wrong_answer_of_the_engines(exported: Workspace, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.build(exported, plugins=False)
    monkeypatch.setattr(demo, "QUESTION", "What is at the bottom left?")
    with pytest.raises(FusionError, match=rf"^The demo model answers '\w+', expected '{ANSWER}'\.$"):
        demo.run(exported, graphs=True)


def test_a_wrong_answer_of_the_cpu(exported: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUESTION", "What is at the bottom left?")
    with pytest.raises(FusionError, match=f"on the CPU, expected '{ANSWER}'"):
        demo.answer_on_cpu(exported)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "ONNX Runtime is not installed; run pip."),
        ("1.23.2", "ONNX Runtime 1.23.2 has no opset 24; 1.24 and later have, for Python 3.11 and later."),
    ],
)
def test_a_machine_whose_cpu_does_not_run_the_bundle(
    version: str | None, reason: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not compared says why."""

    def found() -> SimpleNamespace:
        if version is None:
            raise DeviceError(reason)
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(library, "find_onnxruntime", found)
    with pytest.raises(SkippedStep, match=f"^There is no comparison with the CPU: {re.escape(reason)}$"):
        demo.answer_on_cpu(workspace)
    words = f"not compared with the CPU ({reason.rstrip('.')})"
    nothing: Any = None  # is not looked at
    assert demo.compared(workspace, nothing, nothing, nothing) == ([], words)


def test_engines_that_no_limit_judges(exported: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those with activations of 4 bits."""
    formats = open_bundle(demo.bundle_of(exported)).manifest.weights
    monkeypatch.setattr(engine_check, "ACTIVATIONS_4_BIT", formats["llm.lm_head"])
    with pytest.raises(SkippedStep, match=r"^There is no comparison with the CPU: Activations in nvfp4 have 4 bits, "):
        demo.answer_on_cpu(exported)


def test_a_bundle_that_the_cpu_refuses_is_a_failure(workspace: Workspace) -> None:
    demo.bundle_of(workspace).mkdir()
    with pytest.raises(FusionError, match=r"is not a bundle: it has no bundle\.json"):
        demo.answer_on_cpu(workspace)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_given_bundle_stays_as_it_is(
    has_links: bool,
    workspace: Workspace,
    tiny_tensorrt_bundle: Path,
    trt: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines are built beside links to its files, or copies."""

    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not has_links:
        monkeypatch.setattr(bundles.os, "link", refused)  # type: ignore[attr-defined]
    before = {path: path.stat().st_mtime_ns for path in tiny_tensorrt_bundle.rglob("*")}
    given = dataclasses.replace(workspace, bundle=tiny_tensorrt_bundle)
    assert demo.export(given).summary == f"{tiny_tensorrt_bundle} is given"
    names = {path.name for path in demo.bundle_of(given).iterdir()}
    assert names == {path.name for path in before if path.parent == tiny_tensorrt_bundle} - {"engines"}
    assert (demo.bundle_of(given) / "bundle.json").samefile(tiny_tensorrt_bundle / "bundle.json") is has_links
    demo.build(given, plugins=False)
    assert (demo.bundle_of(given) / "engines").is_dir()
    assert {path: path.stat().st_mtime_ns for path in tiny_tensorrt_bundle.rglob("*")} == before
    assert demo.answer_on_cpu(given).figures["answer"] is not None
    assert demo.picture_of(given).is_file()


def test_what_is_no_bundle_fails(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(FusionError, match=r"is not a bundle: it has no bundle\.json"):
        demo.export(dataclasses.replace(workspace, bundle=tmp_path))


def test_without_the_checkpoint(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "DEMO", tmp_path / "absent")
    with pytest.raises(SkippedStep, match="in a clone of fusion-edge, or pass --bundle"):
        demo.export(workspace)
    with pytest.raises(SkippedStep, match="in a clone of fusion-edge"):
        full_size.export(workspace)


def test_without_a_gpu(exported: Workspace) -> None:
    with installed(FakeTensorRT(*FULL, FakeCuda(gpus=0))):
        with pytest.raises(SkippedStep, match=r"^There is no GPU: CUDA finds no GPU"):
            demo.build(exported, plugins=False)
        with pytest.raises(SkippedStep, match=r"^There is no GPU: CUDA finds no GPU"):
            demo.run(exported, graphs=True)


def test_plugins_without_kernels(exported: Workspace) -> None:
    with (
        installed(FakeTensorRT("tensorrt", "10.3.0", FakeCuda("8.7"))),
        pytest.raises(SkippedStep, match=r"needs 10\.9"),
    ):
        demo.build(exported, plugins=True)


def test_engines_have_the_limits_of_the_device(
    exported: Workspace, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fusion-build has on an Orin Nano with 8 GB."""
    monkeypatch.setattr(bundles, "this_jetson", lambda: Jetson("NVIDIA Jetson Orin Nano", 7_600_000_000))
    demo.build(exported, plugins=False)
    assert {tuple(config.pools.values()) for config in trt.built} == {(512_000_000,)}


def test_the_full_size_on_fakes(workspace: Workspace, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small sizes: what is written, built, loaded and compared with the rooflines."""
    layout = full_size_checkpoint.LAYOUTS["3b"]
    small: dict[str, Any] = {"hidden_size": 128, "heads": 4, "kv_heads": 4, "mlp_width": 256, "vocab_size": 1300}
    vision = dataclasses.replace(layout.vision, width=128, layers=3, mlp_width=256, patch_size=48)
    sizes = dataclasses.replace(layout, vision=vision, tower="siglip-small-patch48-384", **small)
    monkeypatch.setattr(full_size_checkpoint, "LAYOUTS", {"3b": sizes})
    monkeypatch.setattr(full_size, "LAYERS", 2)
    monkeypatch.setattr(full_size, "QUERY_LENGTH", 16)
    full_size.export(workspace)
    assert [path.name for path in workspace.scratch.iterdir()] == ["full-size"]
    built = full_size.build(workspace).figures
    assert built["engines"] > 0
    multiplied = EngineRun(0.0, 1e-3, ())
    monkeypatch.setattr(full_size, "build_engine", lambda *_: BuiltEngine(b"", ()))
    monkeypatch.setattr(full_size, "run_engine", lambda *_: multiplied)
    figures = full_size.run(workspace).figures
    assert figures["gemm_flops"] == 2 * full_size.GEMM_SIZE**3 / 1e-3
    assert figures["prompt_tokens"] == 64 + 16 + 48
    assert all(seconds > 0 for seconds in figures["seconds"].values())
    assert all(share > 0 for share in figures["roofline_shares"].values())
