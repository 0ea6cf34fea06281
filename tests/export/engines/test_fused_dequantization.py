"""Which dequantizations TensorRT-RTX fuses with their GEMM, from the list of layers that its builder prints.

``docs/tensorrt.md`` has the bytes that follow. Nothing runs: the machine has no GPU.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from fusion_edge.benchmarks.acceptance.engine import BuildLog
from fusion_edge.benchmarks.acceptance.quantized_linears import linear_graph
from fusion_edge.export.engines.nvfp4 import use_fp4
from fusion_edge.quant.formats import NVFP4_BLOCK, WeightFormat
from fusion_edge.runtime.backends.tensorrt.library import find_library

OUTPUTS, INPUTS = 4096, 3072
DATA = "g.data"


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    module: ModuleType = pytest.importorskip("tensorrt_rtx")
    return module


def linear(name: str, fmt: str, folder: Path) -> onnx.ModelProto:
    """Return a graph of one linear as bundles for TensorRT have it, with its weights in ``folder``."""
    builder = linear_graph(name, WeightFormat.parse(fmt), INPUTS, OUTPUTS)
    content = np.random.default_rng(0).integers(0, 100, builder.data_bytes, dtype=np.uint8)
    (folder / DATA).write_bytes(content.tobytes())
    return builder.model(DATA, "0")


def build_log(trt: ModuleType, model: onnx.ModelProto, folder: Path, rows: int, capability: str) -> BuildLog:
    """Build an engine, and return the builder's messages with its layers."""
    log = BuildLog(find_library("tensorrt_rtx"))
    logger = log.logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString(), str(folder / "g.onnx")), log.texts
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *[(1, rows, INPUTS)] * 3)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, log.texts
    return log


def largest_output(log: BuildLog) -> int:
    """Return the number of elements of the largest tensor that a layer writes."""
    sizes: list[int] = [math.prod(output["Dimensions"]) for layer in log.layers() for output in layer["Outputs"]]
    return max(sizes)


@pytest.mark.parametrize(
    ("name", "fmt", "rows", "capability", "is_fused"),
    [
        ("llm.lm_head", "int4:128", 1, "8.6", True),
        ("llm.lm_head", "int4:64", 900, "8.6", True),
        ("llm.lm_head", "int8:channel", 1, "8.6", True),
        ("llm.lm_head", "int8:channel", 900, "8.6", True),
        ("llm.lm_head", "fp8", 1, "8.9", True),
        ("llm.lm_head", "fp8", 1, "12.0", True),
        ("vision.projector.up", "int8:channel", 900, "8.6", True),
        ("vision.projector.up", "int8:channel", 1, "8.6", False),
        ("vision.projector.up", "fp8", 900, "12.0", True),
    ],
)
def test_weights_are_dequantized_in_the_gemm(
    trt: ModuleType, tmp_path: Path, name: str, fmt: str, rows: int, capability: str, is_fused: bool
) -> None:
    """Otherwise a layer writes the whole weight in float16."""
    log = build_log(trt, linear(name, fmt, tmp_path), tmp_path, rows, capability)
    assert largest_output(log) == (rows * OUTPUTS if is_fused else OUTPUTS * INPUTS)


@pytest.mark.parametrize("capability", ["12.0", "12.1"])
@pytest.mark.parametrize("rows", [1, 900])
def test_nvfp4_is_multiplied_in_4_bits(trt: ModuleType, tmp_path: Path, rows: int, capability: str) -> None:
    """The GEMM reads both matrices in FP4 and their scales in FP8; no layer writes a dequantized one."""
    model = linear("llm.lm_head", "nvfp4", tmp_path)
    use_fp4(model)
    log = build_log(trt, model, tmp_path, rows, capability)
    assert largest_output(log) <= max(rows * OUTPUTS, rows * INPUTS, 128 * INPUTS // NVFP4_BLOCK)
    (gemm,) = (line for text in log.texts for line in text.splitlines() if ", LayerType: gemm," in line)
    operands = re.findall(r"Dimensions: \[([\d,]*)\][^{}]*Datatype: (FP\w+)", gemm)
    assert operands[0] == (f"1,{rows},{INPUTS}", "FP4E2M1")
    assert (f"1,{INPUTS},{OUTPUTS}", "FP4E2M1") in operands
    assert [kind for _, kind in operands].count("FP8") == 2
