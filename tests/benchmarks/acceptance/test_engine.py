"""Engines of single operators: built by the real TensorRT-RTX, and run on a small fake."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, RTX, FakeTensorRT
from fakes.on_fake_tensorrt import installed
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks.acceptance import bundles, engine, operator_steps, operators
from fusion_edge.benchmarks.acceptance.device import NoCuda
from fusion_edge.benchmarks.acceptance.engine import Target, build, find_target, logged_layers, run, writes_tensor_of
from fusion_edge.benchmarks.acceptance.steps import SkippedStep, Workspace
from fusion_edge.export.engines.decompositions import SINCE, decompose_operators
from fusion_edge.kernels.tensorrt_plugins import PLUGINS
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.errors import FusionError

NO_CUDA = NoCuda("the test has none.", has_gpu=False)
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
DEQUANTIZING = """\
Layers:
Name: __myl_CastMul_0, LayerType: kgen, Inputs: [], Constants: [ { Name: c, Dimensions: [8,4], Datatype: Int8 }], \
Outputs: [ { Name: y.1, Dimensions: [8,4], Datatype: Half }], TacticName: t1, StreamId: 0
Name: node_of_y, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,8] }], Constants: [], \
Outputs: [ { Name: y, Dimensions: [1,4], Datatype: Half }, { Name: z, Dimensions: [] }], TacticName: , StreamId: 0

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [1,8], Location: Device
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, tmp_path, None, None)


def test_layers_in_messages() -> None:
    layers = logged_layers(DEQUANTIZING)
    assert [(one["Name"], one["LayerType"], one["TacticName"]) for one in layers] == [
        ("__myl_CastMul_0", "kgen", "t1"),
        ("node_of_y", "gemm", ""),
    ]
    assert [output["Dimensions"] for output in layers[1]["Outputs"]] == [[1, 4], []]
    assert logged_layers("Engine generation completed.") == []


def test_a_layer_that_writes_the_weights() -> None:
    layers = logged_layers(DEQUANTIZING)
    assert writes_tensor_of(layers, 32) is True
    assert writes_tensor_of(layers[1:], 32) is False
    assert writes_tensor_of([{"Name": "a layer without details"}], 32) is None
    assert writes_tensor_of([], 32) is None


# The real TensorRT-RTX ---------------------------------------------------------------------------------------------


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_cuda", lambda: NO_CUDA)


@needs_rtx
@pytest.mark.parametrize(
    ("form", "fusion"),
    [("int4-128", "fused"), ("int8", "dequantized before the GEMM")],  # of a single row
)
def test_rtx_says_what_it_fuses(form: str, fusion: str, workspace: Workspace, without_gpu: None) -> None:
    """For compute capability 8.9."""
    outcome = operator_steps.linear(workspace, form)
    assert outcome.summary.startswith(f"{fusion}; built with tensorrt_rtx")
    assert outcome.summary.endswith("for 8.9, not run. There is no GPU: the test has none.")
    figures = outcome.figures[f"{form} 1 rows"]
    is_dequantized = fusion != "fused"
    assert figures["writes_dequantized_weights"] is is_dequantized
    assert len(figures["layers"]) == 1 + is_dequantized


@needs_rtx
@needs_opset_24
@pytest.mark.parametrize(
    "step", [lambda space: operator_steps.attention(space, 72), lambda space: operator_steps.scatter(space, True)]
)
def test_rtx_builds_the_operators(
    step: Callable[[Workspace], Any], workspace: Workspace, without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not run. There is no GPU: " in step(workspace).summary


@needs_rtx
def test_an_operator_that_rtx_does_not_know(without_gpu: None) -> None:
    case = operators.gemm(8)
    case.model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(FusionError, match=r"^TensorRT's parser refuses the operator: .*NoSuchOperator"):
        build(find_target(), case)


# Targets -----------------------------------------------------------------------------------------------------------


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(FakeTensorRT(*FULL, FakeCuda("8.7"))):
        target = find_target()
        assert (target.library.name, target.compute_capability, target.capability) == ("tensorrt", "8.7", (8, 7))
        assert isinstance(target.cuda, Cuda)
    with installed(FakeTensorRT(*RTX, FakeCuda(gpus=0))):
        target = find_target()
        assert (target.library.name, target.compute_capability) == ("tensorrt_rtx", "8.9")
        assert isinstance(target.cuda, NoCuda)
    with (
        installed(FakeTensorRT(*FULL, FakeCuda(gpus=0))),
        pytest.raises(
            SkippedStep, match=r"^There is no GPU: .*\. Only TensorRT-RTX builds without one: tensorrt-rtx is "
        ),
    ):
        find_target()


def test_an_orin_with_tensorrt_rtx_alone(workspace: Workspace) -> None:
    """The committed names of TensorRT-RTX have no SM87."""
    with installed(FakeTensorRT(*RTX, FakeCuda("8.7"))):
        for find in (find_target, bundles.expect_gpu):
            with pytest.raises(
                SkippedStep, match=r"^tensorrt_rtx 1\.7\.1\.116 does not support compute capability 8\.7; "
            ):
                find()
    with installed(FakeTensorRT(*RTX, FakeCuda("8.9"))):
        assert find_target().library.is_rtx
        assert bundles.expect_gpu().device == "tensorrt-rtx"


def test_plugins_have_aliases_and_profiles() -> None:
    trt = FakeTensorRT(*FULL, FakeCuda("8.7"))
    trt.plugin.registered = {plugin.id: {} for plugin in PLUGINS}
    target = Target(Library(trt), "8.7", NO_CUDA)
    for case in (operators.plugin(PLUGINS[2], 2, 3, 32), operators.gemm(8)):
        build(target, case)
    with_plugin, plain = trt.built
    assert with_plugin.features == {trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03}
    assert [profile.shapes for profile in with_plugin.profiles] == [
        {
            "x": ((1, 1, 32), (1, 289, 32), (1, 577, 32)),
            "positions": ((0, 1), (1, 144), (2, 144)),
            "latents": ((0, 1, 32), (1, 144, 32), (2, 144, 32)),
            "update": ((0, 1, 32), (1, 144, 32), (2, 144, 32)),
        }
    ]
    assert (plain.features, plain.profiles) == (set(), [])


def test_what_a_machine_lacks_is_skipped(workspace: Workspace) -> None:
    with installed(FakeTensorRT("tensorrt", "10.3.0", FakeCuda("8.7"))):
        with pytest.raises(SkippedStep, match=r"^Compute capability 8\.7 has no FP8; 8\.9 and later have\.$"):
            operator_steps.linear(workspace, "fp8-one-scale")
        with pytest.raises(SkippedStep, match=r"^Compute capability 8\.7 has no NVFP4; 10\.0 and later have\.$"):
            operator_steps.linear(workspace, "nvfp4")
        with pytest.raises(SkippedStep, match=r"^TensorRT 10\.3\.0 has no TensorScatter; step scatter-alias counts"):
            operator_steps.scatter(workspace, is_native=True)
        with pytest.raises(SkippedStep, match=r"needs 10\.9"):
            operator_steps.plugin(workspace, PLUGINS[0].operator, 1, 1)


# Runs on a fake ----------------------------------------------------------------------------------------------------


class MiniTensorRT:
    """Runs one graph on ONNX Runtime, with tensors in the fake's device memory."""

    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, cuda: FakeCuda, case: engine.OperatorCase) -> None:
        self.cuda, self.case = cuda, case
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.wrong = np.float16(0)
        self.runs = 0
        """Run N takes N ms."""
        self.__name__, self.__version__ = "tensorrt", "10.16.0"

        class ILogger:
            Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

        self.ILogger = ILogger

    def Runtime(self, logger: Any) -> MiniTensorRT:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> MiniTensorRT:
        assert plan == b"plan"
        return self

    def create_engine_inspector(self) -> MiniTensorRT:
        return self

    def get_engine_information(self, form: str) -> str:
        assert form == "json"
        return json.dumps({"Layers": [{"Name": "one", "Outputs": []}, "two"], "Bindings": []})

    def create_execution_context(self) -> MiniTensorRT:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.cuda.enqueue(stream, self._compute)
        return True

    def _compute(self) -> None:
        def view(name: str, like: Any) -> Any:
            return self.cuda.view(self.addresses[name], like.nbytes).view(like.dtype).reshape(like.shape)

        inputs = {name: view(name, array) for name, array in self.case.inputs.items()}
        session = ort.InferenceSession(self.case.model.SerializeToString(), providers=["CPUExecutionProvider"])
        for name, result in zip(self.case.expected, session.run(None, inputs), strict=True):
            view(name, result)[...] = result + self.wrong
        self.runs += 1
        self.cuda.clock += self.runs  # milliseconds


def target_of(fake: MiniTensorRT) -> Target:
    return Target(Library(fake), "8.7", Cuda(fake.cuda))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gemm", "scatter"])
def test_a_run_on_the_fake(name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = operators.gemm(16)
    if name == "scatter":
        case = operators.tensor_scatter(2, 5, heads=2, dim=8)
        decompose_operators(case.model, list(SINCE), 1)
    fake = MiniTensorRT(FakeCuda(), case)
    ran = run(target_of(fake), b"plan", case, "one operator", workspace)
    assert ran.largest_error == 0
    assert ran.seconds == 6e-3  # of runs 3 to 9
    assert ran.layers == [{"Name": "one", "Outputs": []}, {"Name": "two"}]
    assert json.loads((workspace.output / "one-operator.layers.json").read_text()) == list(ran.layers)
    shares = {output for output in case.expected if fake.addresses[output] in {fake.addresses[i] for i in case.inputs}}
    assert shares == case.aliases.keys()
    fake.cuda.check_all_freed()


def test_wrong_results_are_found(workspace: Workspace) -> None:
    case = operators.gemm(16)
    fake = MiniTensorRT(FakeCuda(), case)
    fake.wrong = np.float16(0.25)
    with pytest.raises(FusionError, match="one operator, y: 256 of 256 elements are wrong"):
        run(target_of(fake), b"plan", case, "one operator", workspace)


def test_an_output_that_is_not_written_is_found(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = operators.gemm(16)
    fake = MiniTensorRT(FakeCuda(), case)
    monkeypatch.setattr(fake, "_compute", lambda: None)
    with pytest.raises(FusionError, match=r"256 of 256 elements are wrong; .* nan, expected"):
        run(target_of(fake), b"plan", case, "one operator", workspace)


def test_shapes_are_set_for_symbolic_sizes(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = operators.plugin(PLUGINS[1], 2, 3, 32)
    fake = MiniTensorRT(FakeCuda(), case)
    result = next(iter(case.expected.values())).astype(np.float16)

    def compute() -> None:
        fake.cuda.view(fake.addresses["output"], result.nbytes)[...] = result.reshape(-1).view(np.uint8)

    monkeypatch.setattr(fake, "_compute", compute)
    run(target_of(fake), b"plan", case, "plugin", workspace)
    assert fake.shapes == {name: array.shape for name, array in case.inputs.items()}


def test_attention_without_a_fused_kernel(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built again, decomposed, and the step says so."""
    models = []

    def refusing(target: Target, case: engine.OperatorCase) -> engine.BuiltEngine:
        models.append(case.model.SerializeToString())
        if b"TRT_decomposable" not in models[-1]:
            raise FusionError("There is no dedicated kernel.")
        return engine.BuiltEngine(b"plan", ({"Name": "part"},))

    monkeypatch.setattr(operator_steps, "build", refusing)
    with installed(FakeTensorRT(*RTX, FakeCuda(gpus=0))):
        outcome = operator_steps.attention(workspace, 72)
    assert outcome.summary.startswith("prompt decomposed, decode decomposed; built with tensorrt_rtx")
    assert outcome.figures["decode"] == {
        "layers": ["part"],
        "refusal_as_one_layer": "There is no dedicated kernel.",
        "is_decomposed": True,
    }
    assert len(models) == 4
