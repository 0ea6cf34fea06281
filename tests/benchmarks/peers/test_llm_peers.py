"""LLM runners: their shared code and errors. Measurements need the engines."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fusion_edge.benchmarks.peers import __main__ as peers
from fusion_edge.benchmarks.peers import llm as llm_peers
from fusion_edge.benchmarks.peers.runners import genai_llm, llama_cpp_llm, llm, worker
from fusion_edge.benchmarks.peers.runners.llm import LlmWorkload
from fusion_edge.benchmarks.peers.runners.worker import CannotRunError, Settings


class FakeLlm:
    """Records its calls."""

    def __init__(self, model: Path, work: LlmWorkload, settings: Settings) -> None:
        self.settings = {"threads": 3, **settings}
        if not model.exists():
            raise CannotRunError(f"{model} does not exist.")
        self.positions = 0
        self.log: list[tuple[str, int]] = []

    def prefill(self, ids: list[int]) -> None:
        self.positions = len(ids)
        self.log.append(("prefill", self.positions))

    def step(self) -> None:
        self.positions += 1
        self.log.append(("step", self.positions))


def test_timed_steps_are_around_the_context(tmp_path: Path) -> None:
    fake = FakeLlm(tmp_path, LlmWorkload(), {})
    work = LlmWorkload(prompt=900, context=1000, steps=32)
    measured = llm.measure(lambda *_: fake, tmp_path, work, {})
    assert fake.log[:2] == [("prefill", llm.WARM_UP), ("prefill", 900)]
    timed = fake.log[-32:]
    assert timed[0] == ("step", 1000 - 15)
    assert timed[-1] == ("step", 1000 + 16)
    assert measured.settings == {"threads": 3}
    assert 0 < measured.figures.memory <= measured.figures.peak_memory


@pytest.mark.parametrize("option", ["--context=910", "--context=4090", "--prompt=1000"])
def test_impossible_workloads_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["llm", "--genai", "a=x", option]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_report_is_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.dumps({"prompt": 2, "context": 4, "steps": 2})
    measure = functools.partial(llm.measure, FakeLlm)
    arguments = [str(tmp_path), fields, '{"precision": "f32"}']
    assert worker.report(measure, LlmWorkload, ("numpy", "no-such-package"), arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["figures"]["prefill_seconds"] > 0
    assert report["settings"] == {"threads": 3, "precision": "f32"}
    assert sorted(report["versions"]) == ["numpy", "python"]


def test_runner_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = functools.partial(llm.measure, FakeLlm)
    assert worker.report(measure, LlmWorkload, (), [str(tmp_path / "nowhere"), "{}", "{}"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(CannotRunError, match="pip install a-peer"):
        worker.import_engine("no_such_module", "a-peer")


RUNNERS = {
    "genai": ("genai_llm", "GenaiLlm", "onnxruntime_genai", "has no genai_config.json; expected a folder"),
    "openvino": ("openvino_llm", "OpenvinoLlm", "openvino", "has no openvino_model.xml; expected a folder"),
    "llama-cpp": ("llama_cpp_llm", "LlamaCppLlm", "llama_cpp", "is not a file; expected a GGUF file"),
}


@pytest.mark.parametrize("name", RUNNERS)
def test_runners_refuse_other_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kind, package, message = RUNNERS[name]
    assert llm_peers.COMPARISON.runners[name].module.endswith(f".{module}")
    load = getattr(importlib.import_module(f"fusion_edge.benchmarks.peers.runners.{module}"), kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CannotRunError, match="cannot import"):
        load(tmp_path, LlmWorkload(), {})
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    with pytest.raises(CannotRunError, match=message):
        load(tmp_path, LlmWorkload(), {})


def test_openvino_compiles_with_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def read_model(self, path: Path) -> str:
            return str(path)

        def compile_model(self, model: str, device: str, settings: dict[str, object]) -> ModuleType:
            compiled.append((model, settings["INFERENCE_PRECISION_HINT"], settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"]))
            raise CannotRunError("compiled")

    compiled: list[tuple[object, ...]] = []
    module = importlib.import_module("fusion_edge.benchmarks.peers.runners.openvino_llm")
    monkeypatch.setattr(module, "import_engine", lambda module, package: SimpleNamespace(Core=Core))
    monkeypatch.setattr(module, "_keep_last_row", lambda *arguments: None)
    model = tmp_path / module.MODEL
    model.touch()
    for settings in llm_peers.COMPARISON.runners["openvino"].settings.values():
        with pytest.raises(CannotRunError, match="compiled"):
            module.OpenvinoLlm(tmp_path, LlmWorkload(), settings)
    assert compiled == [(str(model), precision, size) for precision in ("bf16", "f32") for size in (0, 32, 128)]


SYSTEM = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | AVX512_VNNI = 0 | {} LLAMAFILE = 1 | "


@pytest.mark.parametrize(
    ("isa", "features", "reason"),
    [
        ("avx2", "", None),
        ("avx_vnni", "AVX_VNNI = 1 |", None),
        ("avx512_vnni", "AVX512 = 1 | AVX512_VNNI = 1 |", None),
        ("avx2", "AVX_VNNI = 1 |", "has AVX_VNNI; build one for avx2"),
        ("avx_vnni", "", "has no AVX_VNNI; build one for avx_vnni"),
        ("avx_vnni", "AVX_VNNI = 1 | AVX512 = 1 | AMX_INT8 = 1 |", "has AMX_INT8, AVX512; build"),
        ("avx512_vnni", "AVX512_VNNI = 1 | AMX_INT8 = 1 |", "has AMX_INT8; build"),
        ("avx512_vnni", "", "has no AVX512_VNNI; build"),
    ],
)
def test_llama_cpp_is_built_for_the_instruction_set(isa: str, features: str, reason: str | None) -> None:
    system = SYSTEM.format(features)
    if reason is None:
        llama_cpp_llm._expect_build(system, isa)
    else:
        with pytest.raises(CannotRunError, match=reason):
            llama_cpp_llm._expect_build(system, isa)


def test_genai_refuses_an_instruction_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", ModuleType("onnxruntime_genai"))
    with pytest.raises(CannotRunError, match="cannot be held to an instruction set"):
        genai_llm.GenaiLlm(tmp_path, LlmWorkload(isa="avx2"), {})


def test_engine_errors_become_one_line(tmp_path: Path) -> None:
    def load(model: Path, work: LlmWorkload, settings: Settings) -> FakeLlm:
        raise RuntimeError("bad\nmodel")

    with pytest.raises(CannotRunError, match="cannot be loaded: bad model"):
        llm.measure(load, tmp_path, LlmWorkload(), {})


def test_folder_without_a_bundle_ends_the_comparison(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["llm", "--bundle", f"ours={tmp_path / 'nowhere'}", "--rounds", "1"]) == 1
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert "nowhere" in first
    assert last.startswith("error: The run of ours failed with exit code 1")
