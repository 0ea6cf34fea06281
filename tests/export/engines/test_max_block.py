"""``fusion-build --max-block``: linears and graphs are cut until every block for weights is small enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.on_fake_tensorrt import build, open_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from support.backend_contract import BackendContract, Subject
from support.checkpoints import TINY, write_checkpoint
from support.graph_runs import CAPACITY, computed, graph_of, inputs_of
from support.opset24 import needs_opset_24
from support.paths import DEMO_CHECKPOINT

from fusion_edge.export import cli
from fusion_edge.export.engines.builder import BuildOptions, EngineBuilder
from fusion_edge.export.engines.decompositions import SINCE, decompose_operators
from fusion_edge.export.engines.graph_values import fix_dimension, inferred_values, tensor_shape
from fusion_edge.export.engines.linear_pieces import ROW_MULTIPLE, Pieces, cut_linears
from fusion_edge.export.engines.optimization_profiles import engine_limits
from fusion_edge.export.engines.partition import largest_block, partition_graph
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.bundle.engine_manifest import EnginePlatform
from fusion_edge.runtime.bundle.engines import engines_folder, read_engines
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.errors import FusionError

LARGE = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, layers=4, width=128, mlp_width=256, patch_size=48),
    language=dataclasses.replace(
        TINY.language,
        hidden_size=512,
        heads=8,
        kv_heads=4,
        head_dim=64,
        mlp_width=512,
        rotary_inverse_frequencies=tuple(10000 ** (-i / 32) for i in range(32)),
    ),
)
"""A model whose patch embedding and lm_head exceed the limit in float16, and whose LLM and vision encoder do stored."""
LIMIT = 1_000_000
INT4 = "--int4 --group-size 64 --target tensorrt"
LM_HEAD = "llm.lm_head.MatMul"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("large") / "FUSION-large", LARGE)
    folder = tmp_path_factory.mktemp("bundle") / "large"
    assert cli.main([str(checkpoint), "-o", str(folder), *INT4.split(), "--rule", "llm.lm_head=int4:64"]) == 0
    return open_bundle(folder)


def cut(model: ModelProto, max_block: int, folder: Path) -> list[ModelProto]:
    """Return the parts of a model with their whole content."""
    pieces = cut_linears(model, max_block)
    return [pieces.filled(part, folder) for part in partition_graph(model, 1, max_block, pieces.matmuls)]


# Linears ---------------------------------------------------------------------------------------------------------


class DataFile:
    """A data file under construction, and its initializers."""

    def __init__(self) -> None:
        self.content = b""
        self.initializers: list[TensorProto] = []

    def add(self, name: str, content: bytes, kind: int, *shape: int) -> str:
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "data"), ("offset", len(self.content)), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.content += content
        return name


def one_linear(folder: Path, kind: str, weight: npt.NDArray[np.int8]) -> ModelProto:
    """Return the model ``x [2,K] -> y [2,N]`` of a weight ``[N,K]``, whose even outputs have the scale 1/2."""
    (outputs, inputs), file, node = weight.shape, DataFile(), helper.make_node
    scales = np.where(np.arange(outputs) % 2, 1, 0.5).astype(np.float16)
    if kind == "int4":
        codes, blocks = weight.T.reshape(-1).view(np.uint8) & 15, np.tile(scales, (inputs // 64, 1))
        names = [
            file.add("values", (codes[::2] | codes[1::2] << 4).tobytes(), TensorProto.INT4, inputs, outputs),
            file.add("scales", blocks.tobytes(), TensorProto.FLOAT16, *blocks.shape),
        ]
        nodes = [node("DequantizeLinear", names, ["columns"], "dequantize", axis=0, block_size=64)]
    elif kind == "int8":
        names = [
            file.add("values", weight.tobytes(), TensorProto.INT8, outputs, inputs),
            file.add("scales", scales.tobytes(), TensorProto.FLOAT16, outputs),
        ]
        nodes = [node("DequantizeLinear", names, ["rows"], "dequantize", axis=0)]
    else:
        file.add("rows", (weight * scales[:, None]).tobytes(), TensorProto.FLOAT16, outputs, inputs)
        nodes = []
    if kind != "int4":
        nodes.append(node("Transpose", ["rows"], ["columns"], "transpose", perm=[1, 0]))
    nodes.append(node("MatMul", ["x", "columns"], ["y"], "linear"))
    (folder / "data").write_bytes(file.content)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2, size])
        for name, size in (("x", inputs), ("y", outputs))
    )
    graph = helper.make_graph(nodes, "one", [x], [y], file.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["fp16", "int8", "int4"]),
    blocks=st.integers(1, 2),
    halves=st.integers(1, 300),
    limit_rows=st.integers(1, 500),
    seed=st.integers(0, 2**32 - 1),
)
def test_pieces_of_a_linear_give_the_same(
    tmp_path: Path, kind: str, blocks: int, halves: int, limit_rows: int, seed: int
) -> None:
    """Sums are multiples of 1/2 of at most 1,024, so float16 is exact and every difference is an error."""
    outputs, inputs, generator = 2 * halves, 64 * blocks, np.random.default_rng(seed)
    weight = generator.integers(-8, 8, (outputs, inputs), np.int8)
    x = generator.integers(-1, 2, (2, inputs)).astype(np.float16)
    whole = one_linear(tmp_path, kind, weight)
    expected = computed(tmp_path, [whole], {"x": x}, is_optimized=False)["y"]
    limit = 2 * inputs * limit_rows
    if limit_rows < min(outputs, ROW_MULTIPLE):
        with pytest.raises(FusionError, match=r"^(values|rows) needs a block of .* and cannot be cut; --max-block is"):
            cut(whole, limit, tmp_path)
        return
    parts = cut(whole, limit, tmp_path)
    assert all(largest_block(part) <= limit for part in parts)
    linears = [node for part in parts for node in part.graph.node if node.op_type == "MatMul"]
    most = limit_rows // ROW_MULTIPLE * ROW_MULTIPLE
    assert len(linears) == (-(-outputs // most) if outputs > limit_rows else 1)
    np.testing.assert_array_equal(computed(tmp_path, parts, {"x": x}, is_optimized=False)["y"], expected)


# Graphs ----------------------------------------------------------------------------------------------------------


def test_dimensions_between_partitions(large: Bundle) -> None:
    """The vision encoder's rows are those of the patches and of the text."""
    values = inferred_values(graph_of(large, VISION_ENCODER))
    assert tensor_shape(values["Add.9"]) == ["crops", "text+64", 128]
    assert tensor_shape(values["Unsqueeze"]) == ["crops", 1, 1, "text+64"]
    values = inferred_values(graph_of(large, LLM))
    assert tensor_shape(values["Add"]) == [1, "positions", 512]
    assert tensor_shape(values["llm.causal_mask.LessOrEqual"]) == [1, 1, "positions", "slots"]


def test_a_dimension_that_is_no_sum_is_unknown(large: Bundle) -> None:
    """Latents are the square of a side."""
    assert "Reshape.7" not in inferred_values(graph_of(large, ALIGNMENT_DECODER))


def plain(bundle: Bundle, name: str) -> ModelProto:
    """Return a graph as JetPack 6.2's TensorRT gets it, with decompositions."""
    language, model = bundle.manifest.model.language, graph_of(bundle, name)
    fix_dimension(model, "capacity", CAPACITY)
    decompose_operators(model, list(SINCE), language.heads // language.kv_heads if name == LLM else 1)
    return model


def in_float32(model: ModelProto, folder: Path) -> ModelProto:
    """Return a model that computes in float32. In float16, ONNX Runtime rounds where it likes, and cuts change that."""
    load_external_data_for_model(model, str(folder))
    constants = [one.t for function in model.functions for node in function.node for one in node.attribute]
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    return model


@needs_opset_24
@pytest.mark.parametrize("make", [graph_of, plain])
@pytest.mark.parametrize(("name", "count", "max_block"), [(VISION_ENCODER, 6, None), (LLM, 1, LIMIT)])
def test_parts_compute_the_same(
    large: Bundle, name: str, count: int, max_block: int | None, make: Callable[[Bundle, str], ModelProto]
) -> None:
    """Every value is equal bit for bit."""
    model = make(large, name)
    pieces = Pieces() if max_block is None else cut_linears(model, max_block)
    parts = partition_graph(model, count, max_block, pieces.matmuls)
    assert len(parts) > 3
    if max_block is not None:
        assert all(largest_block(part) <= max_block for part in parts)
        assert pieces.matmuls > {f"{LM_HEAD}.rows0", f"{LM_HEAD}.rows640"}
    parts = [in_float32(pieces.filled(part, large.folder), large.folder) for part in parts]
    inputs = {key: x.astype(np.float32) if x.dtype == np.float16 else x for key, x in inputs_of(large, name).items()}
    whole = in_float32(make(large, name), large.folder)
    expected = computed(large.folder, [whole], inputs, is_optimized=False)
    actual = computed(large.folder, parts, inputs, is_optimized=False)
    assert actual.keys() > expected.keys()
    for key, array in expected.items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(actual[key], array)


def test_parts_have_names_of_their_own(large: Bundle) -> None:
    """The backend has one memory for a name."""
    passed = [
        {value.name for part in cut(graph_of(large, name), LIMIT, large.folder) for value in part.graph.output}
        for name in (VISION_ENCODER, LLM)
    ]
    assert not passed[0] & passed[1]


def test_the_limit_leaves_smaller_graphs_alone(large: Bundle) -> None:
    model = graph_of(large, LLM)
    before = model.SerializeToString(deterministic=True)
    pieces = cut_linears(model, 10_000_000)
    (part,) = partition_graph(model, 1, 10_000_000, pieces.matmuls)
    assert part.SerializeToString(deterministic=True) == before
    assert pieces.matmuls == frozenset()


def test_a_graph_without_places_for_a_cut(large: Bundle) -> None:
    with pytest.raises(
        FusionError, match=r"^alignment_decoder needs a block of 8\d\d.\d\d kB between two places"
    ) as refusal:
        cut(graph_of(large, ALIGNMENT_DECODER), 600_000, large.folder)
    assert str(refusal.value).endswith("and --max-block is 600.00 kB. Build with --max-block 1MB or more.")


# Engines ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(large: Bundle) -> Iterator[Subject]:
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(large, trt, "--parts=1", "--max-block=1MB") == 0
    backend = open_backend(large, trt)
    yield Subject(backend, large.manifest, 0.02)
    backend.close()
    trt.cuda.check_all_freed()


@needs_opset_24
class TestEnginesOfCutGraphs(BackendContract):
    """The tests of ``backend_contract.py``."""


@needs_opset_24
def test_engines_of_cut_graphs(large: Bundle, subject: Subject) -> None:
    built = read_engines(engines_folder(large, EnginePlatform(*RTX, "8.6")))
    assert built.max_block == LIMIT
    assert len(built.engines[VISION_ENCODER]) == 5
    assert len(built.engines[LLM]) > 5
    assert len(built.engines[ALIGNMENT_DECODER]) == 1
    assert ["crops", "text+64", 128] in [tensor["shape"] for tensor in built.engines[VISION_ENCODER][-1].inputs]


def test_a_limit_that_is_too_small(large: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is raised before the build."""
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(large, trt, "--force", "--max-block=400kB") == 1
    assert capsys.readouterr().err.endswith(
        "error: vision.patch_embedding.weight needs a block of 1.77 MB and cannot be cut; --max-block is 400.00 kB. "
        "Build with --max-block 2MB or more.\n"
    )
    assert not trt.built


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    assert cli.main([str(DEMO_CHECKPOINT), "-o", str(folder), *INT4.split()]) == 0
    return open_bundle(folder)


@pytest.mark.parametrize(("name", "max_block", "fewest"), [(VISION_ENCODER, 1_000_000, 2), (LLM, 100_000, 10)])
def test_tensorrt_builds_the_parts_of_the_demo_model(
    demo: Bundle, tmp_path: Path, name: str, max_block: int, fewest: int
) -> None:
    """With the real TensorRT-RTX."""
    trt: ModuleType = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    alone = dataclasses.replace(demo.manifest, graphs={name: demo.manifest.graphs[name]})
    limits = engine_limits(demo.manifest, demo.manifest.max_context)
    machine = EnginePlatform("tensorrt_rtx", trt.__version__, "8.6")
    options = BuildOptions(parts=1, max_block=max_block)
    builder = EngineBuilder(Bundle(demo.folder, alone), Library(trt), machine, limits, options, uses_plugins=False)
    assert 0.5 * max_block < builder.largest_block() <= max_block
    engines = builder.build(tmp_path)[name]
    assert len(engines) >= fewest
    for engine in engines:
        content = (tmp_path / engine.file.path).read_bytes()
        assert all(tensor["name"].encode() in content for tensor in engine.tensors)
