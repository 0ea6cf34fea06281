"""NVFP4 linears: functions and bundles, run by ONNX Runtime on the CPU, against ``quant/nvfp4.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import FunctionProto, TensorProto, helper
from support.opset24 import needs_opset_24

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration.samples import FEWEST
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.parameters import match_parameters
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights, read_parameter
from fusion_edge.export.lowering.nvfp4 import dequantize_function, quantize_function
from fusion_edge.export.lowering.tensorrt import OPSET
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.quant import float8, nvfp4
from fusion_edge.quant.formats import Nvfp4Activations
from fusion_edge.runtime import load
from fusion_edge.runtime.bundle.config import IMAGE_SIZE
from fusion_edge.runtime.bundle.quantization_report import read_report, sqnr
from fusion_edge.runtime.bundle.reader import open_bundle

Refuse = Callable[..., str]
SCALE = 2.0**-7
RULES = ["--rule=llm.*=nvfp4", "--rule=vision.layers.*=nvfp4", "--rule=alignment.layers.*.mlp.*=nvfp4"]


def run(
    function: FunctionProto, constants: list[TensorProto], scale: float, shape: tuple[int, ...], x: Any = None
) -> npt.NDArray[np.float16]:
    """Run a function on ``x`` or ``constants``, and its tensor scale. The result has ``shape``."""
    inputs = {} if x is None else {"x": x}
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in inputs]
    initializers = [*constants, helper.make_tensor("tensor_scale", TensorProto.FLOAT, [], [scale])]
    names = [*inputs, *(tensor.name for tensor in initializers)]
    node = helper.make_node(function.name, names, ["y"], domain=DOMAIN)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, shape)
    graph = helper.make_graph([node], "g", declared, [output], initializers)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: Any = session.run(None, inputs)
    numbers: npt.NDArray[np.float16] = outputs[0]
    return numbers


@needs_opset_24
@pytest.mark.parametrize("shape", [(1, 5, 64), (2, 3, 4, 16), (7, 32), (1, 0, 32)])
def test_activations(shape: tuple[int, ...]) -> None:
    """Bit for bit, with blocks of zeros, of values that are too small for a scale, and too large."""
    x = np.random.default_rng(0).normal(0, 3, shape).astype(np.float16)
    x[..., :16] *= np.resize(np.array([1, 0, 1e-4, 1000], np.float16), (*shape[:-1], 1))
    expected = nvfp4.fake_quantize(torch.from_numpy(x), SCALE).numpy()
    actual = run(quantize_function(OPSET), [], SCALE, shape, x)
    np.testing.assert_array_equal(actual, expected)


@needs_opset_24
def test_midpoints_of_activations() -> None:
    """Ties go to even codes."""
    x = np.zeros((1, 1, 16), np.float16)
    x[..., :8] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    x[..., 8:] = -x[..., :8]
    actual = run(quantize_function(OPSET), [], 1.0, x.shape, x)
    assert actual[0, 0, :8].tolist() == [6, 0, 1, 1, 2, 2, 4, 4]
    np.testing.assert_array_equal(actual[..., 8:], -actual[..., :8])


@needs_opset_24
def test_weights() -> None:
    weights = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    scale = nvfp4.tensor_scale(float(weights.abs().max()))
    rounded = nvfp4.quantize(weights, scale, None)
    scales = float8.encode(rounded.packed.scales / np.float32(scale))
    constants = [
        helper.make_tensor("values", TensorProto.UINT4, [6, 48], rounded.packed.values.tobytes(), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT8E4M3FN, scales.shape, scales.tobytes(), raw=True),
    ]
    actual = run(dequantize_function(OPSET), constants, scale, (6, 48))
    np.testing.assert_array_equal(actual, rounded.values.half().numpy())


# Bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "s"
    write_samples(folder, FEWEST)
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    options = ["--target=tensorrt", "--fp16", *RULES, f"--calibrate={samples}"]
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), *options]) == 0
    return folder


def test_bundle(bundle: Path) -> None:
    """Codes are uint4, scales FP8; the bundle is valid, and its report names the method."""
    opened = open_bundle(bundle)
    linears = [name for name, fmt in opened.manifest.weights.items() if fmt == "nvfp4"]
    assert {name.split(".")[0] for name in linears} == {"llm", "vision", "alignment"}
    report = read_report(opened)
    assert report is not None
    assert {(linear.format, linear.method) for linear in report.linears} == {("nvfp4", "gptq")}
    weights = BundleWeights(opened)
    for name in linears:
        activations = weights.activation_quantization(name)
        assert isinstance(activations, Nvfp4Activations)
        assert np.log2(activations.scale) % 1 == 0
    model = onnx.load(bundle / "llm.onnx", load_external_data=False)
    onnx.checker.check_model(str(bundle / "llm.onnx"))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["llm.layers.0.mlp.down.weight"] == TensorProto.UINT4
    assert kinds["llm.layers.0.mlp.down.weight.scales"] == TensorProto.FLOAT8E4M3FN


def test_weights_keep_their_accuracy(bundle: Path, tiny_checkpoint: Path) -> None:
    """What is stored differs from the checkpoint by the error that the calibration reports."""
    opened = open_bundle(bundle)
    report, stored = read_report(opened), BundleWeights(opened)
    assert report is not None
    with Checkpoint(tiny_checkpoint) as source:
        original = CheckpointWeights(source, match_parameters(source, read_config(source)))
        for linear in report.linears:
            expected, actual = (read_parameter(one, f"{linear.name}.weight") for one in (original, stored))
            error = np.square(expected.astype(np.float64) - actual).sum()
            assert linear.weight_sqnr == pytest.approx(sqnr(error, float(np.square(expected).sum())), abs=0.011)


@needs_opset_24
def test_bundle_matches_eager_interpreter(bundle: Path) -> None:
    """In float16 a few activations round to a neighboring FP4 value, which is 2 or 3 octaves coarser than 8 bits."""
    opened = open_bundle(bundle)
    pixels = np.random.default_rng(0).normal(0, 0.5, (1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    text = np.random.default_rng(1).normal(0, 0.5, (1, 5, opened.manifest.model.language.hidden_size))
    inputs = pixels, text.astype(np.float32), np.ones((1, 5), np.bool_)
    expected = EagerBackend(opened.manifest.model, BundleWeights(opened)).encode(*inputs)
    with load(bundle, device="cpu", threads=1) as fusion:
        actual = np.asarray(fusion.backend.encode(*inputs))
    assert np.square(actual - expected).mean() <= (0.1 * expected.std()) ** 2


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--target cpu", "nvfp4 (llm.lm_head) does not run on --target cpu; use int4, or --target tensorrt."),
        ("--target cuda", "nvfp4 (llm.lm_head) does not run on --target cuda; use int4, or --target tensorrt."),
        (
            "--target tensorrt",
            "llm.lm_head is nvfp4, which needs samples for the range of its activations: add --calib",
        ),
    ],
)
def test_refusals(tiny_checkpoint: Path, tmp_path: Path, refused: Refuse, options: str, reason: str) -> None:
    command = tiny_checkpoint, "-o", tmp_path / "b", "--fp16", "--rule=llm.lm_head=nvfp4", *options.split()
    assert reason in refused(cli.main, *command, code=2)


def test_the_token_table_is_not_nvfp4(tiny_checkpoint: Path, tmp_path: Path, refused: Refuse) -> None:
    command = tiny_checkpoint, "-o", tmp_path / "b", "--target=tensorrt", "--rule=llm.embed_tokens=nvfp4"
    assert "llm.embed_tokens cannot be nvfp4: it is looked up by row" in refused(cli.main, *command, code=2)
