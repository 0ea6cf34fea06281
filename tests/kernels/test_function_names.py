"""Names inside functions, which TensorRT's ONNX parser up to 10.7 confuses with names of the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, JETPACK_6, RTX, FakeTensorRT
from fakes.on_fake_tensorrt import build, open_backend
from onnx import FunctionProto, GraphProto, ModelProto, helper
from support.checkpoints import TINY, write_checkpoint
from support.graph_runs import CAPACITY, computed, graph_of, inputs_of
from support.opset24 import needs_opset_24
from support.tensorrt_parser import inlined

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration.samples import FEWEST
from fusion_edge.export.engines.decompositions import SINCE, decompose_operators
from fusion_edge.export.engines.graph_values import fix_dimension
from fusion_edge.export.engines.partition import partition_graph
from fusion_edge.export.lowering import tensorrt
from fusion_edge.kernels.onnx_functions.alignment import add_rows_function
from fusion_edge.kernels.onnx_functions.builder import qualify_names
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

GRAPHS = (VISION_ENCODER, ALIGNMENT_DECODER, LLM)
GROUPED = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, kv_heads=1))
"""A model with grouped-query attention, whose function differs."""
OPTIONS = {
    "fp16": "--fp16 --target tensorrt",
    "int8": "--int8 --target tensorrt",
    "calibrated": "--int8 --target tensorrt --calibrate SAMPLES",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("grouped") / "FUSION-grouped", GROUPED)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Function that exports a bundle with options, once. SAMPLES in the options is a folder of samples."""
    bundles: dict[str, Bundle] = {}

    def export(options: str) -> Bundle:
        if options not in bundles:
            folder = tmp_path_factory.mktemp("bundle")
            if "SAMPLES" in options:
                write_samples(folder / "samples", FEWEST)
            arguments = options.replace("SAMPLES", str(folder / "samples")).split()
            assert cli.main([str(checkpoint), "-o", str(folder / "b"), *arguments]) == 0
            bundles[options] = open_bundle(folder / "b")
        return bundles[options]

    return export


def decomposed(bundle: Bundle, name: str) -> ModelProto:
    """Return a graph as JetPack 6.2's TensorRT gets it, with decompositions."""
    language = bundle.manifest.model.language
    model = graph_of(bundle, name)
    fix_dimension(model, "capacity", CAPACITY)
    decompose_operators(model, list(SINCE), language.heads // language.kv_heads if name == LLM else 1)
    return model


def unqualified(model: ModelProto) -> ModelProto:
    """Return ``model`` with unqualified names in its functions."""
    for function in model.functions:
        nodes = [names for node in function.node for names in (node.input, node.output)]
        for names in (function.input, function.output, *nodes):
            names[:] = [name.rpartition("::")[2] for name in names]
    return model


# Names -----------------------------------------------------------------------------------------------------------


def tensors(graph: GraphProto) -> set[str]:
    """Return the names of all tensors, including those of branches."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)}
    for node in graph.node:
        names |= {*node.input, *node.output}
        for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            names |= tensors(branch)
    return names - {""}


def inner_names(function: FunctionProto) -> set[str]:
    return {*function.input, *function.output} | tensors(GraphProto(node=function.node))


def confused(model: ModelProto) -> set[tuple[str, str]]:
    """Return names in functions that are also names of the graph or of another function."""
    names = {function.name: inner_names(function) for function in model.functions}
    return {
        (function, name)
        for function, inside in names.items()
        for name in inside
        if name in tensors(model.graph) or any(name in names[other] for other in names.keys() - {function})
    }


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_names_in_functions_are_unique(exported: Callable[[str], Bundle], options: str, parts: int) -> None:
    bundle = exported(OPTIONS[options])
    for name in GRAPHS:
        for model in (graph_of(bundle, name), decomposed(bundle, name)):
            for part in partition_graph(model, parts) if name == LLM else [model]:
                assert confused(part) == set()
                assert not any(":" in tensor for tensor in tensors(part.graph))


def test_qualified_names() -> None:
    function = qualify_names(add_rows_function(21))
    assert list(function.input) == ["AddRows::x", "AddRows::positions", "AddRows::latents", "AddRows::update"]


def test_a_missing_input_stays_missing() -> None:
    clip = helper.make_node("Clip", ["x", "", "most"], ["output"])
    function = helper.make_function("d", "AtMost", ["x", "most"], ["output"], [clip], [helper.make_opsetid("", 21)])
    qualify_names(function)
    assert list(function.node[0].input) == ["AtMost::x", "", "AtMost::most"]


# Results of the parser -----------------------------------------------------------------------------------


def variants(bundle: Bundle, name: str) -> Iterator[list[ModelProto]]:
    """Yield a graph as it is and decomposed, whole and in partitions."""
    for make in (graph_of, decomposed):
        for parts in (1, 3) if name == LLM else (1,):
            model = make(bundle, name)
            yield partition_graph(model, parts) if parts > 1 else [model]


@needs_opset_24
@pytest.mark.parametrize("name", GRAPHS)
def test_the_parser_reads_qualified_names(exported: Callable[[str], Bundle], name: str) -> None:
    bundle = exported(OPTIONS["fp16"])
    given = inputs_of(bundle, name)
    for models in variants(bundle, name):
        expected = computed(bundle.folder, models, given)
        read = [inlined(model) for model in models]
        assert not any(node.domain for model in read for node in model.graph.node)
        actual = computed(bundle.folder, read, given)
        assert actual.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_allclose(actual[key], array, atol=2e-3 * array.std(dtype=np.float64), rtol=0)


@needs_opset_24
def test_the_parser_misreads_unqualified_names(exported: Callable[[str], Bundle]) -> None:
    """Latents go to the rows of the prompt."""
    bundle = exported(OPTIONS["fp16"])
    given = inputs_of(bundle, LLM)
    for models in variants(bundle, LLM):
        expected = computed(bundle.folder, models, given)["logits"]
        actual = computed(bundle.folder, [inlined(unqualified(model)) for model in models], given)["logits"]
        assert np.abs(actual - expected).max() > 0.1 * expected.std()


@needs_opset_24
def test_the_fake_misreads_unqualified_names(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "qualify_names", lambda function: function)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "b"), "--fp16", "--target=tensorrt"]) == 0
    bundle = open_bundle(tmp_path / "b")
    assert confused(graph_of(bundle, LLM)) >= {("AddRows", "positions")}
    trt = FakeTensorRT(*JETPACK_6, FakeCuda())
    assert build(bundle, trt, "--parts=1") == 0
    with pytest.raises(Exception, match="ScatterND"):
        open_backend(bundle, trt)


@needs_opset_24
@pytest.mark.parametrize("library", [JETPACK_6, FULL, RTX], ids=lambda library: library[1])
@pytest.mark.parametrize("parts", ["1", "3"])
def test_names_in_engines_are_unique(exported: Callable[[str], Bundle], library: tuple[str, str], parts: str) -> None:
    bundle, trt = exported(OPTIONS["fp16"]), FakeTensorRT(*library, FakeCuda())
    assert build(bundle, trt, "--force", f"--parts={parts}") == 0
    assert any(node.domain for config in trt.built for node in config.model.graph.node)
    for config in trt.built:
        assert confused(config.model) == set()
    open_backend(bundle, trt).close()
