"""What the steps of single operators conclude from runs on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, FakeTensorRT

from fusion_edge.benchmarks.acceptance import operator_steps, operators, quantized_linears
from fusion_edge.benchmarks.acceptance.engine import BuiltEngine, EngineRun, Layers, OperatorCase, Target
from fusion_edge.benchmarks.acceptance.steps import Workspace
from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.library import Library

COPY_RATE = 100e9
SECONDS = {1: 1e-3, operator_steps.PROMPT: 4e-3}
"""Of a linear layer, by its rows."""


class Runs:
    """Stands in for TensorRT: every engine has the same layers, and its time follows from its rows."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.plan_bytes = 0
        self.cases: list[OperatorCase] = []
        self.labels: list[str] = []

    def build(self, target: Target, case: OperatorCase) -> BuiltEngine:
        self.cases.append(case)
        return BuiltEngine(bytes(self.plan_bytes), ())

    def run(self, target: Target, plan: bytes, case: OperatorCase, label: str, workspace: Workspace) -> EngineRun:
        self.labels.append(label)
        rows = case.inputs["x"].shape[1] if "x" in case.inputs else 1
        return EngineRun(0.001, SECONDS.get(rows, 2e-3), self.layers)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, tmp_path, None, tmp_path / "kernels")


def on_gpu(
    monkeypatch: pytest.MonkeyPatch, *outputs: list[int], version: str = FULL[1], capability: str = "8.9"
) -> Runs:
    """Stand in for a GPU whose engines have a layer that writes tensors of these shapes."""
    runs = Runs([{"Name": "gemm", "Outputs": [{"Dimensions": shape} for shape in outputs]}])
    cuda = FakeCuda(capability)
    target = Target(Library(FakeTensorRT("tensorrt", version, cuda)), capability, Cuda(cuda))
    for name, value in {"INPUTS": 64, "OUTPUTS": 128}.items():
        monkeypatch.setattr(quantized_linears, name, value)
    replaced: dict[str, Any] = {
        "find_target": lambda: target,
        "build": runs.build,
        "run": runs.run,
        "copy_bandwidth": lambda cuda: COPY_RATE,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(operator_steps, name, value)
    return runs


@pytest.mark.parametrize("form", ["int4-64", "w8a8", "fp8", "fp8-one-scale"])
def test_rates_of_a_linear_layer(form: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = on_gpu(monkeypatch, [1, 128])
    weights, many = 64 * 128, operator_steps.PROMPT
    bits = quantized_linears.FORMS[form].format.bits
    runs.plan_bytes = weights * bits // 8
    outcome = operator_steps.linear(workspace, form)
    assert outcome.figures["weight_bytes_a_second"] == pytest.approx(weights * bits / 8 / 1e-3)
    assert outcome.figures["flops"] == pytest.approx(2 * weights * many / 4e-3)
    assert outcome.summary.startswith("fused; one row 0% of a copy's bandwidth; 256 rows ")
    assert runs.labels == [f"{form} 1 rows", f"{form} {many} rows"]


@pytest.mark.parametrize(("version", "opset"), [("10.3.0", 21), ("10.16.0", 24)])
def test_linears_have_the_opset_of_the_version(
    version: str, opset: int, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = on_gpu(monkeypatch, [1, 128], version=version)
    operator_steps.linear(workspace, "int4-64")
    assert {one.version for case in runs.cases for one in case.model.opset_import if not one.domain} == {opset}


def test_dequantized_weights_are_seen(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, [1, 128], [128, 64])
    outcome = operator_steps.linear(workspace, "int8")
    assert outcome.summary.startswith("dequantized before the GEMM; ")
    assert outcome.figures["int8 1 rows"]["writes_dequantized_weights"] is True


@pytest.mark.parametrize(
    ("form", "bits", "fusion"),
    [
        ("int4-64", 4.25, "fused"),
        ("int4-64", 6, "fused"),
        ("int4-64", 6.25, "stored dequantized"),
        ("int8", 8, "fused"),
        ("int8", 16, "stored dequantized"),
    ],
)
def test_weights_that_the_builder_has_dequantized(
    form: str, bits: float, fusion: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer writes them, and the engine is as large as that of float16."""
    runs = on_gpu(monkeypatch, [1, 128])
    runs.plan_bytes = int(64 * 128 * bits / 8)
    outcome = operator_steps.linear(workspace, form)
    assert outcome.figures[f"{form} 1 rows"]["plan_bits_a_weight"] == bits
    assert outcome.summary.startswith(f"{fusion}; ")


def test_layers_without_outputs_tell_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    assert operator_steps.linear(workspace, "int8").summary.startswith("fusion unknown; ")


@pytest.mark.parametrize(
    ("version", "operator", "kind"),
    [("10.3.0", "PlainAttention", "decomposed"), ("10.14.0", "Attention", "one layer")],
)
def test_attention_has_the_form_of_the_version(
    version: str, operator: str, kind: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = on_gpu(monkeypatch, [1], version=version)
    outcome = operator_steps.attention(workspace, 96)
    assert [case.model.graph.node[0].op_type for case in runs.cases] == [operator, operator]
    assert outcome.summary == f"prompt {kind}, decode {kind}; 1000 us, 1000 us"
    assert outcome.figures["prompt"]["refusal_as_one_layer"] is None
    assert outcome.figures["prompt"]["largest_error"] == 0.001


@pytest.mark.parametrize(("version", "operator"), [("10.3.0", "PlainAttention"), ("10.14.0", "Attention")])
def test_int8_cache(version: str, operator: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts attend with the operator, or its decomposition; steps have one row behind a full cache."""
    runs = on_gpu(monkeypatch, [1], version=version)
    outcome = operator_steps.int8_cache(workspace, 96)
    for case in runs.cases:
        assert sum(node.op_type == operator for node in case.model.graph.node) == 1
    assert [case.inputs["q"].shape[2] for case in runs.cases] == [256, 1, 1]
    assert [len(case.inputs["slots"]) for case in runs.cases[1:]] == [operators.CAPACITY - 1] * 2
    assert runs.labels == [f"int8-cache-96 {name}" for name in ("prompt", "decode", "decode-flat")]
    assert outcome.summary == "prompt 1 layers, decode 1 layers, decode-flat 1 layers; 1000 us, 1000 us, 1000 us"


def test_scatter(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = on_gpu(monkeypatch, [1])
    summaries = [operator_steps.scatter(workspace, is_native).summary for is_native in (True, False)]
    assert [case.model.graph.node[0].op_type for case in runs.cases] == ["TensorScatter", "PlainTensorScatter"]
    assert summaries == ["1000.0 us; the cache has 6.3 MB"] * 2
    assert runs.labels == ["tensor-scatter", "scatter-alias"]


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.operator)
def test_plugins_are_registered_and_run(plugin: Any, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, registered = on_gpu(monkeypatch, [1]), []
    module = ModuleType("tensorrt.plugin")
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
    monkeypatch.setattr(operator_steps, "kernel_source", lambda space, architecture: architecture)
    monkeypatch.setattr(tensorrt_plugins, "register", lambda *given: registered.append(given))
    outcome = operator_steps.plugin(workspace, plugin.operator, 0, 144)
    assert registered == [(module, "89", "89")]
    assert runs.labels == [f"{plugin.operator} 0 rows"]
    assert runs.cases[0].uses_plugins
    assert outcome.figures["largest_error"] == 0.001
