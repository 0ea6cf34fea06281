"""``fusion-build`` compares its engines with the CPU, on a fake TensorRT that computes with ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.fake_tensorrt import FULL, JETPACK_6, RTX
from fakes.on_fake_tensorrt import installed
from hypothesis import given
from hypothesis import strategies as st
from support.compared_engines import STAGES, Change, build, changed, engines_of, fake, folders, half
from support.opset24 import needs_opset_24

from fusion_edge.export.engines import engine_check
from fusion_edge.export.engines.stage_outputs import StageRunner
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.bundle.engine_manifest import ENGINES_MANIFEST
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER, read_engines
from fusion_edge.runtime.bundle.graphs import VISION_ENCODER
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.errors import FusionError

pytestmark = needs_opset_24


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny"))


# Engines that are right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [RTX, FULL, JETPACK_6], ids=lambda library: library[1])
def test_right_engines(bundle: Path, library: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage is compared, printed and kept. Other operators round differently, within the limits."""
    assert build(fake(library), bundle) == 0
    printed = capsys.readouterr().out.splitlines()
    check = engines_of(bundle).check
    assert check.skipped is None
    assert [one.stage for one in check.stages] == STAGES
    for one in check.stages:
        assert 0 <= one.relative_error < one.limit / 4
        assert one.limit < 0.05
        assert any(line.startswith(f"{one.stage} ") and f" {one.relative_error:.1e} " in line for line in printed)
    assert [one.logits.tokens for one in check.stages if one.logits] == [1, 8, 1]
    assert all(one.logits.same_tokens == one.logits.tokens for one in check.stages if one.logits)
    assert all(0 <= one.logits.kl_divergence <= one.logits.kl_limit for one in check.stages if one.logits)
    assert cli_info.main([str(bundle)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Compared"))
    assert all(f"{one.stage} {one.relative_error:.1e}" in line for one in check.stages)


def test_a_slight_difference_is_measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that are 1 % larger are 1 % off; the stages behind get those of the CPU."""
    assert build(fake(), bundle) == 0
    before = {one.stage: one.relative_error for one in engines_of(bundle).check.stages}
    monkeypatch.setattr(engine_check, "GROWTH", 8)  # 1 % is within no limit of so few layers

    def larger(features: np.ndarray[Any, Any]) -> None:
        features *= features.dtype.type(1.01)

    changed(monkeypatch, "features", larger)
    assert build(fake(), bundle, "--force") == 0
    after = {one.stage: one.relative_error for one in engines_of(bundle).check.stages}
    for stage in STAGES[:2]:
        assert after[stage] == pytest.approx(0.01, abs=2**-11)
    for stage in STAGES[2:5]:
        assert after[stage] == before[stage]
    assert after[STAGES[5]] > before[STAGES[5]]


def test_json_and_engines_up_to_date(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(fake(), bundle) == 0
    written = json.loads((folders(bundle)[0] / ENGINES_MANIFEST).read_text())
    trt = fake()
    capsys.readouterr()
    assert build(trt, bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out)["check"] == written["check"]
    assert trt.loaded == 0  # compared once
    assert build(trt, bundle) == 0
    assert "prefill in a scene" in capsys.readouterr().out


# Engines that are wrong -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tiny_tensorrt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines that were not compared. Read-only."""
    folder = Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path_factory.mktemp("built") / "tiny"))
    assert build(fake(), folder, "--skip-comparison") == 0
    return folder


def compared(built: Path) -> str:
    """Return the error of the comparison; afterwards all memory of the device is free."""
    (folder,) = folders(built)
    trt = fake()
    with installed(trt), pytest.raises(FusionError) as error:
        engine_check.compare_with_cpu(open_bundle(built), Library(trt), folder, read_engines(folder))
    trt.cuda.check_all_freed()
    return str(error.value)


def swapped(values: np.ndarray[Any, Any]) -> None:
    values[:] = np.roll(values, 1)


def not_a_number(values: np.ndarray[Any, Any]) -> None:
    values[3] = math.nan


def infinite(values: np.ndarray[Any, Any]) -> None:
    values[3] = math.inf


@pytest.mark.parametrize(
    ("output", "change", "stage"),
    [
        *(("features", change, STAGES[0]) for change in (half, swapped, not_a_number, infinite)),
        *((name, change, "alignment") for name in ("latents", "keys", "values") for change in (swapped, not_a_number)),
    ],
)
def test_wrong_engines(built: Path, output: str, change: Change, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wrong stage is named, with the remedy."""
    changed(monkeypatch, output, change)
    message = compared(built)
    assert f" are wrong in {stage}: they differ from the CPU by more than rounding (relative error " in message
    assert "Run the bundle with --device cpu, or build with another version of TensorRT, and report this. " in message
    assert ("relative error nan" in message) == (change in (not_a_number, infinite))


def change_logits(stage: str, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Change the last logits of a stage behind the backend, which would refuse to load with wrong decode steps."""
    run, ask = StageRunner.run, StageRunner.ask_scene

    def wrong_run(self: Any, backend: Any, given: Any = None) -> Any:
        outputs = run(self, backend, given)
        if given is not None and stage != STAGES[5]:
            change((outputs.prompt if stage == STAGES[3] else outputs.steps)[-1])
        return outputs

    def wrong_ask(self: Any, backend: Any) -> Any:
        logits = ask(self, backend)
        if stage == STAGES[5]:
            change(logits[-1])
        return logits

    monkeypatch.setattr(StageRunner, "run", wrong_run)
    monkeypatch.setattr(StageRunner, "ask_scene", wrong_ask)


@pytest.mark.parametrize("change", [half, not_a_number])
@pytest.mark.parametrize("stage", STAGES[3:])
def test_wrong_logits(built: Path, stage: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the last decode step alone."""
    change_logits(stage, monkeypatch, change)
    assert f" are wrong in {stage}: they differ" in compared(built)


def test_one_wrong_token_of_many(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A likely token whose logit is off moves the norm by less than its limit; the distributions show it."""

    def raise_likeliest(logits: np.ndarray[Any, Any]) -> None:
        logits[logits.argmax()] += 0.4

    change_logits(STAGES[3], monkeypatch, raise_likeliest)
    message = compared(built)
    assert " are wrong in prefill: they differ from the CPU by more than rounding (KL divergence " in message


def test_a_constant_in_logits_means_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(logits: np.ndarray[Any, Any]) -> None:
        logits += 3

    change_logits(STAGES[3], monkeypatch, add)
    assert build(fake(), bundle) == 0


def test_8_bit_activations_have_a_remedy(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_check, "_formats", lambda *_: {"w8a8"})
    changed(monkeypatch, "features", half)
    assert " Run the bundle with --device cpu, or export with --vision fp16, or build with " in compared(built)


def test_wrong_engines_are_not_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their timing cache is: the next build is faster."""
    changed(monkeypatch, "features", half)
    assert build(fake(FULL), bundle) == 1
    assert " are wrong in encode global crops: " in capsys.readouterr().err
    assert [path.suffix for path in (bundle / ENGINES_FOLDER).iterdir()] == [".timing"]


def test_engines_of_before_stay(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(fake(), bundle) == 0
    before = {path: path.read_bytes() for path in folders(bundle)[0].iterdir()}
    changed(monkeypatch, "features", half)
    assert build(fake(), bundle, "--force") == 1
    assert {path: path.read_bytes() for path in folders(bundle)[0].iterdir()} == before


def test_float16_in_place_of_8_bit_activations(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the CPU alone rounds to 8 bits: the limit is larger, and for the vision encoder only."""
    bundle, engines = open_bundle(built), engines_of(built)
    roundings = [engine_check._squared_roundings(bundle, engines)]
    monkeypatch.setattr(engine_check, "_formats", lambda _, graph: {"w8a8"} if graph == VISION_ENCODER else {"fp16"})
    roundings.append(engine_check._squared_roundings(bundle, engines))
    (vision,) = engines.engines[VISION_ENCODER]
    replaced = {VISION_ENCODER: (dataclasses.replace(vision, float16_reason="It failed"),)}
    engines = dataclasses.replace(engines, engines={**engines.engines, **replaced})
    roundings.append(engine_check._squared_roundings(bundle, engines))
    assert roundings[0][0] < roundings[1][0] < roundings[2][0]
    assert roundings[0][1:] == roundings[1][1:] == roundings[2][1:]


def test_8_bit_activations_of_interaction_layers(built: Path) -> None:
    """The LLM runs these layers, too."""
    bundle, engines = open_bundle(built), engines_of(built)
    weights = {**bundle.manifest.weights, "alignment.layers.0.mlp.up": "w8a8"}
    other = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, weights=weights))
    before, after = (engine_check._squared_roundings(one, engines) for one in (bundle, other))
    assert [a < b for a, b in zip(before, after, strict=True)] == [False, True, True]


# Interrupts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_engine", [False, True])
def test_ctrl_c(
    bundle: Path, is_engine: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU's side and on the engines'."""
    run = StageRunner.run

    def interrupted(self: Any, backend: Any, given: Any = None) -> Any:
        if (given is not None) == is_engine:
            os.kill(os.getpid(), signal.SIGINT)
        return run(self, backend, given)

    monkeypatch.setattr(StageRunner, "run", interrupted)
    assert build(fake(), bundle) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert folders(bundle) == []


# Figures ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 1))
def test_the_limit_of_the_divergence(seed: int, relative: float) -> None:
    """Logits that are all wrong by a quarter of the limit have a divergence of a sixteenth, up to what 1,024 vary."""
    generator = np.random.default_rng(seed)
    expected = generator.normal(0, 1, (3, 1024)).astype(np.float32)
    noise = generator.normal(0, relative / 4, expected.shape).astype(np.float32)
    found = engine_check._of_logits("prefill", relative, expected + noise, expected)
    assert found.relative_error == pytest.approx(relative / 4, rel=0.15)
    assert found.logits is not None
    assert 1 / 32 < found.logits.kl_divergence / found.logits.kl_limit < 1 / 8


def test_relative_error() -> None:
    ones = np.ones((2, 2), np.float32)
    assert engine_check.relative_error(ones, ones) == 0
    assert engine_check.relative_error(1.5 * ones, ones) == 0.5
    assert engine_check.relative_error(ones, 2 * ones) == 0.5
    assert math.isnan(engine_check.relative_error(ones, 0 * ones))
    assert math.isnan(engine_check.relative_error(math.inf * ones, ones))
