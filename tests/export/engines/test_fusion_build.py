"""``fusion-build`` with the real TensorRT-RTX, which builds engines for GPUs that the machine does not have.

It does not load them there, so what they take and give is read from its parser's networks, and from the engines' bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from support.checkpoints import TINY, write_checkpoint
from support.paths import DEMO_CHECKPOINT, GOLDEN

from fusion_edge.benchmarks.acceptance.engine import BuildLog, Layers
from fusion_edge.export import cli
from fusion_edge.export.engines import builder as engine_builder
from fusion_edge.export.engines import cli as cli_build
from fusion_edge.export.engines.graph_values import fix_dimension
from fusion_edge.export.engines.optimization_profiles import (
    DimensionRanges,
    EngineLimits,
    engine_limits,
    optimization_profiles,
)
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.bundle.engine_manifest import Engine, EnginePlatform, Engines
from fusion_edge.runtime.bundle.engines import engines_folder, read_engines
from fusion_edge.runtime.bundle.graphs import ALIGNMENT_DECODER, LLM, VISION_ENCODER
from fusion_edge.runtime.bundle.manifest import MANIFEST, Manifest
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

CHECKPOINTS = {
    "demo": DEMO_CHECKPOINT,
    "phi": GOLDEN / "FUSION-tiny-Phi",
    "llama": GOLDEN / "FUSION-X-tiny-LLaMA",
}
PRECISIONS = {"fp16": "--fp16", "int4": "--int4 --group-size 64 --rule llm.layers.*.mlp.down=int8:channel"}
Built = Callable[..., tuple[Path, Engines]]
Listed = dict[tuple[Path, str, str], Layers]
TYPES = (
    "ATTENTION_INPUT",
    "KV_CACHE_UPDATE",
    "ROTARY_EMBEDDING",
    "NORMALIZATION",
    "SOFTMAX",
    "DEQUANTIZE",
    "MATRIX_MULTIPLY",
)
"""Layer types that show how TensorRT reads a graph."""
LAYERS = {
    # checkpoint, precision, compute capability: layers of each type, then kernels of fused attention in a run
    ("demo", "fp16", "8.9"): {
        VISION_ENCODER: ((4, 0, 0, 8, 0, 0, 21), 4),
        ALIGNMENT_DECODER: ((0, 0, 0, 6, 0, 0, 9), 0),
        LLM: ((4, 8, 8, 6, 3, 0, 39), 4),
    },
    ("phi", "int4", "8.9"): {
        VISION_ENCODER: ((26, 0, 0, 52, 0, 0, 109), 0),
        ALIGNMENT_DECODER: ((0, 0, 0, 6, 0, 9, 9), 0),
        LLM: ((8, 16, 16, 6, 3, 58, 59), 8),
    },
    ("llama", "fp16", "12.0"): {
        VISION_ENCODER: ((39, 0, 0, 78, 0, 0, 161), 0),
        ALIGNMENT_DECODER: ((0, 0, 0, 4, 0, 0, 6), 0),
        LLM: ((7, 14, 14, 4, 2, 0, 48), 7),
    },
}
"""Every attention, cache update and rotation is a layer of its own. Softmax is that of the interaction layers only."""
ENGINE_TYPES = {"gemm", "runtime_fusion", "kgen", "copy", "cast", "reshape", "shape_call", "signal", "wait"}
"""Layer types of the engines: matrix products, generated kernels, and what moves data or waits. None is a plugin."""


def in_one_process(*case: str) -> Any:
    """Return the parameters of tests that share their engines: one process of pytest-xdist builds them."""
    return pytest.param(*case, marks=pytest.mark.xdist_group("engines of " + " ".join(case)))


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    module: ModuleType = pytest.importorskip("tensorrt_rtx")
    return module


@pytest.fixture(scope="module")
def listed(trt: ModuleType) -> Iterator[Listed]:
    """Let builders list the layers of their engines. Yields the lists by bundle, compute capability and graph."""
    lists: Listed = {}
    config, plan = engine_builder.EngineBuilder._config, engine_builder.EngineBuilder._plan

    def detailed(self: Any, *arguments: Any) -> Any:
        result = config(self, *arguments)
        result.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        return result

    def watched(self: Any, model: onnx.ModelProto, *rest: Any) -> Any:
        self._messages.texts.clear()
        result = plan(self, model, *rest)
        lists[self._bundle.folder, self._platform.compute_capability, model.graph.name] = self._messages.layers()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_builder, "Messages", BuildLog)
        patch.setattr(engine_builder.EngineBuilder, "_config", detailed)
        patch.setattr(engine_builder.EngineBuilder, "_plan", watched)
        yield lists


@pytest.fixture(scope="module")
def built(trt: ModuleType, listed: Listed, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return ``built(checkpoint, precision, compute capability, *options)``: a bundle and its engines, cached."""
    bundles: dict[tuple[Path, str], Path] = {}
    engines: dict[tuple[Any, ...], Engines] = {}

    def build(checkpoint: Path, precision: str, capability: str, *options: str) -> tuple[Path, Engines]:
        exported, key = (checkpoint, precision), (checkpoint, precision, capability, options)
        if exported not in bundles:
            bundles[exported] = tmp_path_factory.mktemp("bundle") / "b"
            command = [str(checkpoint), "-o", str(bundles[exported]), "--target=tensorrt"]
            assert cli.main([*command, *PRECISIONS[precision].split()]) == 0
        folder = bundles[exported]
        if key not in engines:
            command = [str(folder), "--library=tensorrt-rtx", f"--device={capability}", *options]
            assert cli_build.main(command) == 0
            machine = EnginePlatform("tensorrt_rtx", trt.__version__, capability)
            engines[key] = read_engines(engines_folder(open_bundle(folder), machine))
        return folder, engines[key]

    return build


@pytest.mark.parametrize(
    ("checkpoint", "precision", "capability"),
    [
        in_one_process(*case)
        for case in (
            *itertools.product(["demo"], PRECISIONS, ["8.6", "8.9", "12.0"]),
            ("phi", "int4", "8.9"),
            ("llama", "fp16", "12.0"),
        )
    ],
)
def test_every_graph(built: Built, trt: ModuleType, checkpoint: str, precision: str, capability: str) -> None:
    folder, engines = built(CHECKPOINTS[checkpoint], precision, capability, "--parts=1")
    bundle = open_bundle(folder)
    assert engines.engines.keys() == bundle.manifest.graphs.keys()
    assert engines.machine.compute_capability == capability
    assert engines.operator == "function"
    check_engines(trt, bundle, engines.engines, engines_folder(bundle, engines.machine))


@pytest.mark.parametrize(("checkpoint", "precision", "capability"), [in_one_process(*case) for case in LAYERS])
def test_layer_types(
    built: Built, listed: Listed, trt: ModuleType, checkpoint: str, precision: str, capability: str
) -> None:
    """Of the networks as exported, and of the engines as the builder lists them.

    Every profile of the LLM has its own kernels: a GEMM's for prompts, a GEMV's for decode steps.
    """
    folder, engines = built(CHECKPOINTS[checkpoint], precision, capability, "--parts=1")
    for name, (layers, fused) in LAYERS[checkpoint, precision, capability].items():
        network = parsed(trt, open_bundle(folder), name)
        types = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
        assert tuple(types[one] for one in TYPES) == layers, name
        assert types["ATTENTION_OUTPUT"] == types["ATTENTION_INPUT"]
        assert not {one for one in types if "PLUGIN" in one}
        kernels = listed[folder, capability, name]
        assert {one["LayerType"] for one in kernels} <= ENGINE_TYPES
        attention = Counter(one["Name"].split("_myl")[0] for one in kernels if "_mha_" in one["Name"])
        runs = {"_gemm_mha_v2": len(engines.prompt_lengths), "_gemv_mha_v1": len(engines.decode_windows)}
        expected = {kind: fused * count for kind, count in runs.items()} if name == LLM else {"_gemm_mha_v2": fused}
        assert attention == Counter(expected), name


@pytest.mark.parametrize(("checkpoint", "precision"), [("phi", "fp16"), ("llama", "int4")])
def test_graphs_without_vision_tower(trt: ModuleType, tmp_path: Path, checkpoint: str, precision: str) -> None:
    """Other formats, without the golden checkpoints' vision towers: building those takes most of a minute."""
    command = [str(CHECKPOINTS[checkpoint]), "-o", str(tmp_path / "b"), "--target=tensorrt"]
    assert cli.main([*command, *PRECISIONS[precision].split()]) == 0
    bundle = open_bundle(tmp_path / "b")
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != VISION_ENCODER}
    part = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, graphs=graphs))
    machine = EnginePlatform("tensorrt_rtx", trt.__version__, "8.6")
    limits = engine_limits(bundle.manifest, bundle.manifest.max_context)
    options = engine_builder.BuildOptions(parts=1)
    builder = engine_builder.EngineBuilder(part, Library(trt), machine, limits, options, uses_plugins=False)
    check_engines(trt, bundle, builder.build(tmp_path), tmp_path)


def check_engines(trt: ModuleType, bundle: Bundle, engines: Mapping[str, tuple[Engine, ...]], folder: Path) -> None:
    for name, (engine,) in engines.items():
        assert_describes(engine, described(trt, parsed(trt, bundle, name)))
        assert_holds_names(folder / engine.file.path, engine)
        limits = engine_limits(bundle.manifest, bundle.manifest.max_context)
        assert list(engine.profiles) == optimization_profiles(bundle.manifest, limits)[name]


def parsed(trt: ModuleType, bundle: Bundle, name: str) -> Any:
    """Return a graph as exported (``INetworkDefinition``), for the whole context."""
    model = onnx.load(bundle.folder / f"{name}.onnx", load_external_data=False)
    fix_dimension(model, "capacity", bundle.manifest.max_context)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(model.SerializeToString(), str(bundle.folder / MANIFEST))
    return network


def described(trt: ModuleType, network: Any) -> Mapping[str, list[dict[str, Any]]]:
    """Return inputs and outputs as TensorRT's parser sees them. Dynamic sizes are -1."""

    def describe(tensor: Any) -> dict[str, Any]:
        return {"name": tensor.name, "dtype": trt.nptype(tensor.dtype).__name__, "shape": list(tensor.shape)}

    return {
        "inputs": [describe(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [describe(network.get_output(i)) for i in range(network.num_outputs)],
    }


def assert_describes(engine: Engine, network: Mapping[str, list[dict[str, Any]]]) -> None:
    """Check that the manifest has the network's tensors, and each profile a range for every dynamic input."""
    for side, tensors in (("inputs", engine.inputs), ("outputs", engine.outputs)):
        assert [tensor["name"] for tensor in tensors] == [tensor["name"] for tensor in network[side]]
        for tensor, parsed_tensor in zip(tensors, network[side], strict=True):
            assert tensor["dtype"] == parsed_tensor["dtype"]
            assert [-1 if isinstance(size, str) else size for size in tensor["shape"]] == parsed_tensor["shape"]
    tensors = (*engine.inputs, *engine.outputs)
    varying = {size for tensor in tensors for size in tensor["shape"] if isinstance(size, str)}
    for profile in engine.profiles:
        assert profile.keys() == varying
        assert all(least <= typical <= largest for least, typical, largest in profile.values())


def assert_holds_names(path: Path, engine: Engine) -> None:
    """Check that the engine's bytes name these inputs and outputs: it cannot be loaded here."""
    content = path.read_bytes()
    for tensor in (*engine.inputs, *engine.outputs):
        assert tensor["name"].encode() in content


def test_parts_are_a_chain(built: Built) -> None:
    """Partitions have the whole graph's inputs and outputs. Values between them are output once, read unchanged."""
    folder, engines = built(DEMO_CHECKPOINT, "fp16", "8.6", "--parts=3")
    _, whole = built(DEMO_CHECKPOINT, "fp16", "8.9", "--parts=1")
    parts, (one,) = engines.engines[LLM], whole.engines[LLM]
    assert [part.file.path for part in parts] == [f"llm-{number}-of-3.engine" for number in (1, 2, 3)]
    given: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    for part in parts:
        for tensor in part.inputs:
            if tensor["name"] in given:
                assert tensor == given[tensor["name"]]
            else:
                taken[tensor["name"]] = tensor
        assert not given.keys() & {tensor["name"] for tensor in part.outputs}
        given |= {tensor["name"]: tensor for tensor in part.outputs}
        assert part.profiles == one.profiles
        assert_holds_names(engines_folder(open_bundle(folder), engines.machine) / part.file.path, part)
    assert taken == {tensor["name"]: tensor for tensor in one.inputs}
    assert given.items() >= {tensor["name"]: tensor for tensor in one.outputs}.items()
    assert len(given) > len(one.outputs)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint whose engines are mostly weights, not kernels."""
    language = dataclasses.replace(
        TINY.language,
        hidden_size=512,
        heads=8,
        kv_heads=8,
        head_dim=64,
        mlp_width=1024,
        rotary_inverse_frequencies=tuple(10000 ** (-i / 32) for i in range(32)),
    )
    config = dataclasses.replace(TINY, language=language)
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "FUSION-wide", config)


def test_int4_engines_are_smaller(built: Built, wide: Path) -> None:
    sizes = {precision: built(wide, precision, "8.9", "--parts=1")[1].engines for precision in PRECISIONS}
    (half,), (quarter,) = (sizes[precision][LLM] for precision in ("fp16", "int4"))
    assert quarter.file.size < 0.6 * half.file.size


def test_decode_engine_omits_interaction_layers(built: Built, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine for decode only has none of their weights: TensorRT detects that they get no rows."""
    folder, both = built(wide, "fp16", "8.9", "--parts=1")

    def steps_alone(manifest: Manifest, limits: EngineLimits) -> dict[str, list[DimensionRanges]]:
        ranges = optimization_profiles(manifest, limits)
        return ranges | {LLM: ranges[LLM][1:]}

    monkeypatch.setattr(engine_builder, "optimization_profiles", steps_alone)
    _, steps = built(wide, "fp16", "12.0", "--parts=1")
    weights = {
        tensor.name: next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
        for tensor in onnx.load(folder / "llm.onnx", load_external_data=False).graph.initializer
        if tensor.external_data and tensor.name.startswith("alignment.")
    }
    saved = both.engines[LLM][0].file.size - steps.engines[LLM][0].file.size
    assert saved > 0.9 * sum(weights.values()) > 1e6


def test_float8_weights(tmp_path: Path, refused: Callable[..., str]) -> None:
    """They build where the GPU has FP8, and are refused elsewhere."""
    command = [str(DEMO_CHECKPOINT), "-o", str(tmp_path / "b"), "--target=tensorrt", "--fp16", "--rule=*=fp8"]
    assert cli.main(command) == 0
    for capability in ("8.9", "12.0"):
        assert cli_build.main([str(tmp_path / "b"), "--library=tensorrt-rtx", f"--device={capability}"]) == 0
    message = refused(cli_build.main, tmp_path / "b", "--library=tensorrt-rtx", "--device=8.6")
    assert " in fp8, which compute capability 8.6 does not have (8.9 and later do); export it with " in message
    rule = re.search(r"--rule '(.*=fp16)'", message)
    assert rule is not None
    assert cli.main([*command[:-1], "--force", f"--rule={rule[1]}", command[-1]]) == 0
    message = refused(cli_build.main, tmp_path / "b", "--library=tensorrt-rtx", "--device=8.6")
    assert f" {rule[1].removesuffix('=fp16')} in fp8" not in message


def test_json(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    folder, engines = built(DEMO_CHECKPOINT, "int4", "8.6", "--parts=1")
    capsys.readouterr()
    assert cli_build.main([str(folder), "--library=tensorrt-rtx", "--device=8.6", "--parts=1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["state"] == "up to date"
    assert printed["engines"] == json.loads(engines.to_text())["engines"]
