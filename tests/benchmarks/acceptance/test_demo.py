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
from fakes.fake_tensorrt import FULL, Builder, FakeTensorRT, INetworkDefinition
from fakes.on_fake_tensorrt import installed
from onnx import TensorProto
from support.demo_model import ANSWER, PICTURE, QUESTION
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks import full_size_checkpoint
from fusion_edge.benchmarks.acceptance import bundles, demo, full_size
from fusion_edge.benchmarks.acceptance.engine import BuiltEngine, EngineRun
from fusion_edge.benchmarks.acceptance.steps import SkippedStep, Workspace
from fusion_edge.export.engines import engine_check, engine_folder
from fusion_edge.export.engines.stage_outputs import StageOutputs
from fusion_edge.export.planning.traffic import decode_windows
from fusion_edge.runtime.backends import devices
from fusion_edge.runtime.backends.onnxruntime import library
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.jetson import ContiguousMemory, Jetson

ORIN_NANO = Jetson("NVIDIA Jetson Orin Nano", 7_600_000_000)
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
    kept = demo.cpu_outputs_of(exported)
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


def test_an_int8_kv_cache_on_fakes(exported: Workspace, trt: FakeTensorRT) -> None:
    assert demo.export_variant(exported, demo.INT8_CACHE).summary.endswith("KV cache in int8")
    manifest = open_bundle(demo.bundle_of(exported, demo.INT8_CACHE)).manifest
    assert (manifest.cache, manifest.has_per_token_scales) == ("int8", True)
    assert demo.answer_on_cpu(exported, demo.INT8_CACHE).figures == {"answer": ANSWER}
    demo.build(exported, plugins=False, variant=demo.INT8_CACHE)
    outcome = demo.run(exported, graphs=True, variant=demo.INT8_CACHE)
    assert outcome.figures["answer"] == ANSWER
    assert outcome.figures["differences"][-1]["stage"] == "prefill in a scene"
    demo.cpu_outputs_of(exported, demo.INT8_CACHE).unlink()
    with pytest.raises(FusionError, match="outputs of the CPU to compare with: step demo-int8-cache-cpu failed"):
        demo.run(exported, graphs=True, variant=demo.INT8_CACHE)


def test_a_vision_encoder_in_8_bits_on_fakes(
    exported: Workspace, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built as exported, and in float16 by a TensorRT that does not build INT8."""
    exporting = demo.export_variant(exported, demo.W8A8)
    weights = open_bundle(demo.bundle_of(exported, demo.W8A8)).manifest.weights
    quantized = [name for name, fmt in weights.items() if fmt == "w8a8"]
    assert len(quantized) == sum(name.startswith("vision.") for name in weights) - 2
    assert exporting.summary == f"{len(quantized)} linears of the vision encoder in w8a8"
    assert all(exporting.figures["ranges"][name] > 0.1 for name in quantized)
    assert demo.answer_on_cpu(exported, demo.W8A8).figures == {"answer": ANSWER}
    built = demo.build(exported, plugins=False, variant=demo.W8A8)
    assert built.summary.endswith("; the vision encoder in INT8")
    assert demo.run(exported, graphs=True, variant=demo.W8A8).figures["answer"] == ANSWER
    whole = Builder.build_serialized_network

    def without_int8(self: Builder, network: INetworkDefinition, config: Any) -> Any:
        weights = [tensor for tensor in network.model.graph.initializer if tensor.dims]
        has_int8 = any(tensor.data_type == TensorProto.INT8 for tensor in weights)
        trt.build_error = "no INT8" if has_int8 else None
        return whole(self, network, config)

    monkeypatch.setattr(Builder, "build_serialized_network", without_int8)
    built = demo.build(exported, plugins=False, variant=demo.W8A8)
    assert built.summary.endswith("; vision_encoder.engine in float16, for INT8 failed: no INT8")
    assert built.figures["float16_in_place_of_int8"] == {"vision_encoder.engine": "no INT8"}
    assert demo.run(exported, graphs=True, variant=demo.W8A8).figures["answer"] == ANSWER


def test_activations_that_are_not_known(exported: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "opset_24_unsupported_reason", lambda: "ONNX Runtime is not installed.")
    with pytest.raises(SkippedStep, match=r"^The ranges of the activations are not known: ONNX Runtime is not inst"):
        demo.export_variant(exported, demo.W8A8)


@pytest.mark.parametrize("variant", [demo.INT8_CACHE, demo.W8A8])
def test_a_given_bundle_has_no_variants(variant: str, workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(SkippedStep, match=r"^--bundle replaces the demo model; leave it out to check the variants"):
        demo.export_variant(dataclasses.replace(workspace, bundle=tmp_path), variant)


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
    version: str | None, reason: str, exported: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not compared says why."""

    def found() -> SimpleNamespace:
        if version is None:
            raise DeviceError(reason)
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(library, "find_onnxruntime", found)
    with pytest.raises(SkippedStep, match=f"^There is no comparison with the CPU: {re.escape(reason)}$"):
        demo.answer_on_cpu(exported)
    words = f"not compared with the CPU ({reason.rstrip('.')})"
    nothing: Any = None  # is not looked at
    assert demo.compared(exported, nothing, nothing, nothing) == ([], words)


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
    monkeypatch.setattr(bundles, "this_jetson", lambda: ORIN_NANO)
    demo.build(exported, plugins=False)
    assert {tuple(config.pools.values()) for config in trt.built} == {(512_000_000,)}


def test_a_device_without_a_block_for_the_weights(
    exported: Workspace, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is skipped with the remedy, as an Orin Nano with its default CMA skips the full size."""
    (exported.scratch / "demo").rename(exported.scratch / "full-size")
    for module in (bundles, engine_folder):
        monkeypatch.setattr(module, "contiguous_memory", lambda: ContiguousMemory(4096, 1, 20_000, 256_000_000))
    assert full_size.build(exported).figures["engines"] > 0  # on a machine that is no small Jetson
    trt.built.clear()
    for module in (bundles, engine_folder):
        monkeypatch.setattr(module, "this_jetson", lambda: ORIN_NANO)
    with pytest.raises(SkippedStep) as skipped:
        full_size.build(exported)
    assert trt.built == []
    reason = str(skipped.value)
    assert re.match(
        r"The weights of an engine need up to .* in one block, and at most .* are free \(1 free blocks ", reason
    )
    assert reason.endswith(
        "Add cma=950M to APPEND in /boot/extlinux/extlinux.conf and reboot. After a reboot, run this part before "
        "anything else: add --only full-size --output fusion-acceptance-full-size to the command."
    )


def test_the_full_size_on_fakes(workspace: Workspace, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small sizes: what is written, built, loaded and compared with the rooflines."""
    layout = full_size_checkpoint.LAYOUTS["3b"]
    small: dict[str, Any] = {"hidden_size": 128, "heads": 4, "kv_heads": 4, "mlp_width": 256, "vocab_size": 1300}
    vision = dataclasses.replace(layout.vision, width=128, layers=3, mlp_width=256, patch_size=48)
    sizes = dataclasses.replace(layout, vision=vision, tower="siglip-small-patch48-384", **small)
    monkeypatch.setattr(full_size_checkpoint, "LAYOUTS", {"3b": sizes})
    monkeypatch.setattr(full_size, "LAYERS", 2)
    monkeypatch.setattr(full_size, "QUERY_LENGTH", 16)
    monkeypatch.setattr(full_size, "CONTEXT", 2048)
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
    outcome = full_size.windows(workspace)
    windows = outcome.figures["windows"]
    assert {size: one["tokens"] for size, one in windows.items()} == {512: 479, 2048: 2015}
    short, whole = windows.values()
    token = 2 * 2 * 128 * 2  # keys and values of two layers, float16
    assert whole["bytes"] - short["bytes"] == (2048 - 3 * 512) * token
    assert all(one["seconds"] > 0 for one in windows.values())
    assert re.match(
        r"512 tokens [\d.]+ ms for .*, 2048 tokens [\d.]+ ms for .* of a copy's bandwidth$", outcome.summary
    )


def test_the_full_size_has_several_windows() -> None:
    assert decode_windows(full_size.CONTEXT) == [512, 1024, 4096]


def test_engines_with_one_window_fail(exported: Workspace, trt: FakeTensorRT) -> None:
    (exported.scratch / "demo").rename(exported.scratch / "full-size")
    full_size.build(exported)
    with pytest.raises(FusionError, match=r"^The engines have one decode window \(512 tokens\); expected several\.$"):
        full_size.windows(exported)
