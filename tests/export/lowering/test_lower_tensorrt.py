"""Graphs for TensorRT, run by ONNX Runtime on the CPU, compared with the eager interpreter and the released outputs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from support.opset24 import needs_opset_24
from support.paths import DEMO_CHECKPOINT, GOLDEN
from test_golden import LLAMA, NEW_TOKENS, PHI, Case, each_case

from fusion_edge.benchmarks.demo.samples import write_samples
from fusion_edge.export import cli
from fusion_edge.export.calibration import driver
from fusion_edge.export.calibration.samples import FEWEST
from fusion_edge.export.checkpoint.tensor_mapping import Parameter
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.targets.tensorrt import TENSORRT
from fusion_edge.export.reference.bundle_weights import BundleWeights
from fusion_edge.export.reference.eager_backend import EagerBackend
from fusion_edge.kernels.onnx_functions import alignment
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.quant.formats import SYMMETRIC_ZERO_POINT, ActivationQuantization, WeightFormat
from fusion_edge.runtime import Fusion, Sampling, Turn, load
from fusion_edge.runtime.backends.base import Backend, Floats, ImageAlignment, Integers, KvPrefix
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.bundle.config import IMAGE_SIZE
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.errors import UsageError

HALF = 0.03
"""Largest difference as a share of the standard deviation. float16 rounds to 2^-11 = 0.0005 of a value. Errors of some
tens of matmuls and sums in sequence grow with the square root of their number, and the largest of thousands is four
deviations: 0.0005 * sqrt(50) * 4 = 0.014, doubled."""
CHECKPOINTS = {"demo": DEMO_CHECKPOINT, PHI: GOLDEN / PHI, LLAMA: GOLDEN / LLAMA}
PICTURE = GOLDEN / "phi_one_turn.png"
INT4 = {
    "demo": ["--int4"],
    PHI: ["--int4", "--group-size=64"],
    LLAMA: ["--int4", "--group-size=64", "--rule=llm.layers.*.mlp.down=int8:channel"],  # 112 inputs
}
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return ``exported(checkpoint, *options)``, which exports each bundle for TensorRT once."""
    bundles: dict[tuple[str, ...], Path] = {}

    def export(checkpoint: str, *options: str) -> Path:
        key = (checkpoint, *options)
        if key not in bundles:
            folder = tmp_path_factory.mktemp("bundle") / "b"
            assert cli.main([str(CHECKPOINTS[checkpoint]), "-o", str(folder), "--target=tensorrt", *options]) == 0
            bundles[key] = folder
        return bundles[key]

    return export


class Compared:
    """Returns the results of a backend, checked against a reference on the same inputs."""

    name = "compared"

    def __init__(self, backend: Backend, reference: EagerBackend) -> None:
        self.backend, self.reference, self.max_context = backend, reference, backend.max_context
        self.compared: list[str] = []

    def encode(self, pixels: Floats, text_embeds: Floats, text_mask: npt.NDArray[np.bool_]) -> npt.ArrayLike:
        inputs = pixels, text_embeds, text_mask
        return self._same("encode", self.backend.encode(*inputs), self.reference.encode(*inputs))

    def align(self, features: Any, latent_cells: Integers, context_cells: Integers) -> ImageAlignment:
        aligned = self.backend.align(features, latent_cells, context_cells)
        self._expected = self.reference.align(np.asarray(features), latent_cells, context_cells)
        self._same("align", aligned.latents, self._expected.latents)
        return aligned

    def prefill(
        self,
        embeddings: Floats,
        image: ImageAlignment,
        latent_positions: Integers,
        question_positions: Integers,
        capacity: int,
        prefix: KvPrefix | None = None,
    ) -> Floats:
        rest = latent_positions, question_positions, capacity
        own, expected = (None, None) if prefix is None else prefix.memory
        actual = self.backend.prefill(embeddings, image, *rest, own)
        return self._same("prefill", actual, self.reference.prefill(embeddings, self._expected, *rest, expected))

    def prefill_prefix(self, embeddings: Floats) -> KvPrefix:
        pair = self.backend.prefill_prefix(embeddings), self.reference.prefill_prefix(embeddings)
        return KvPrefix(len(embeddings), pair)

    def rewind(self, length: int) -> None:
        self.backend.rewind(length)
        self.reference.rewind(length)

    def decode(self, embedding: Floats) -> Floats:
        return self._same("decode", self.backend.decode(embedding), self.reference.decode(embedding))

    def close(self) -> None:
        pass

    def _same(self, name: str, actual: npt.ArrayLike, expected: npt.NDArray[Any]) -> Floats:
        self.compared.append(name)
        assert_close(actual, expected)
        return np.asarray(actual)


def assert_close(actual: npt.ArrayLike, expected: npt.NDArray[Any]) -> None:
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= HALF * expected.std()


@needs_opset_24
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("demo", ["--fp16"]),  # the others in float16: test_released_answers
        ("demo", ["--fp16", "--rule=*=fp8"]),
        *INT4.items(),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else value,
)
def test_matches_eager_interpreter(exported: Export, checkpoint: str, options: list[str]) -> None:
    """Compares every array: two questions with the shortest query length, one with the longest."""
    folder = exported(checkpoint, *options)
    with load(folder, device="cpu", threads=1) as fusion:
        reference = EagerBackend(fusion.config, BundleWeights(open_bundle(folder)))
        compared = Compared(fusion.backend, reference)
        watched = Fusion(fusion.manifest, compared, fusion.tokenizer, reference.embed)
        lengths, history = fusion.manifest.query_lengths, list[Turn]()
        for question, length in (("What is it?", min(lengths)), ("How many?", min(lengths)), ("Why?", max(lengths))):
            sampling = Sampling(max_new_tokens=4)
            answer = watched.answer(PICTURE, question, history=history, query_length=length, sampling=sampling)
            history = [Turn(question, answer.text)] if length == min(lengths) else []
        assert compared.compared.count("prefill") == 3
        assert compared.compared.count("decode") >= 3


def calibrated(checkpoint: Path, output: Path, target: str) -> None:
    """Export a calibrated bundle whose formats are the same for each target."""
    samples = output.parent / "samples"
    if not samples.exists():
        write_samples(samples, FEWEST)
    options = ["--int8", "--group-size=channel", f"--target={target}", f"--calibrate={samples}"]
    assert cli.main([str(checkpoint), "-o", str(output), *options]) == 0


@pytest.fixture(scope="module")
def integer_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "b"
    calibrated(tiny_checkpoint, folder, "tensorrt")
    return folder


@needs_opset_24
def test_quantized_activations(integer_bundle: Path) -> None:
    """The vision encoder's are signed with zero point 0; in float16 some round to a neighboring integer."""
    bundle = open_bundle(integer_bundle)
    weights = BundleWeights(bundle)
    linears = [name for name, fmt in bundle.manifest.weights.items() if fmt == "w8a8"]
    assert linears
    for name in linears:
        found = weights.activation_quantization(name)
        assert isinstance(found, ActivationQuantization)
        assert found.zero_point == SYMMETRIC_ZERO_POINT
    pixels = np.random.default_rng(0).normal(0, 0.5, (1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    text = np.random.default_rng(1).normal(0, 0.5, (1, 5, bundle.manifest.model.language.hidden_size))
    inputs = pixels, text.astype(np.float32), np.ones((1, 5), np.bool_)
    expected = EagerBackend(bundle.manifest.model, weights).encode(*inputs)
    with load(integer_bundle, device="cpu", threads=1) as fusion:
        actual = np.asarray(fusion.backend.encode(*inputs))
    assert np.square(actual - expected).mean() <= (0.05 * expected.std()) ** 2


def test_calibration_for_another_target_restarts(
    integer_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All formats are the same, but a CPU's quantized activations have zero points."""

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(driver, "write_bundle", killed)
        with pytest.raises(Killed):
            calibrated(tiny_checkpoint, tmp_path / "b", "cpu")
    calibrated(tiny_checkpoint, tmp_path / "b", "tensorrt")
    for file in integer_bundle.glob("*.data"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


class Killed(BaseException):
    """A kill, which no handler catches."""


@needs_opset_24
@each_case
def test_released_answers(
    case: Case, exported: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands reproduce, in float16, the released code's logits after the prompt, and its tokens."""
    seen: list[Floats] = []
    watch(monkeypatch, seen)
    tokens = [] if case.image_tokens is None else [f"--image-tokens={case.image_tokens}"]
    bundle = exported(case.facts["checkpoint"], "--fp16", *tokens)
    for number, question, history in case.turns():
        past = tmp_path / "history.json"
        past.write_text(json.dumps([vars(turn) for turn in history]), encoding="utf-8")
        capsys.readouterr()
        seen.clear()
        options = ["--history", str(past), "--json", "--query-len", str(case.facts["query_len"]), "--device=cpu"]
        command = [str(bundle), "--image", str(case.image), "--ask", question, *options]
        assert cli_run.main([*command, "--max-new-tokens", str(NEW_TOKENS)]) == 0
        (answer,) = json.loads(capsys.readouterr().out)["answers"]
        assert_close(seen[0], case.arrays[f"t{number}_last_logits"])
        assert_same_until_a_tie(answer["token_ids"], case.arrays[f"t{number}_output_ids"].tolist(), seen)


def watch(monkeypatch: pytest.MonkeyPatch, seen: list[Floats]) -> None:
    """Record the logits of every token."""
    for name in ("prefill", "decode"):
        method = getattr(OnnxRuntimeBackend, name)

        def watched(self: OnnxRuntimeBackend, *inputs: Any, method: Callable[..., Floats] = method) -> Floats:
            seen.append(method(self, *inputs).copy())
            return seen[-1]

        monkeypatch.setattr(OnnxRuntimeBackend, name, watched)


def assert_same_until_a_tie(actual: list[int], expected: list[int], logits: list[Floats]) -> None:
    """Assert equal tokens up to the first tie within the tolerance: the model's weights are random."""
    for row, (token, other) in zip(logits, zip(actual, expected, strict=True), strict=False):
        if token != other:
            assert row[token] - row[other] <= HALF * row.std()
            return


# Graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--fp16"], INT4[PHI]], ids=["fp16", "int4"])
def test_operators_are_standard(exported: Export, options: list[str]) -> None:
    """Except for three functions that the model defines. There are no branches and no contributed operators."""
    folder = exported(PHI, *options)
    own = set()
    for name in ("vision_encoder", "alignment_decoder", "llm"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        onnx.checker.check_model(str(folder / f"{name}.onnx"))
        assert {entry.version for entry in model.opset_import if not entry.domain} == {24}
        functions = {function.name for function in model.functions}
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        for node in nodes:
            assert node.domain == "" or (node.domain == DOMAIN and node.op_type in functions)
            assert node.op_type not in ("If", "Loop", "Scan")
        own |= {node.op_type for node in nodes if node.domain}
        by_operator = Counter(node.op_type for node in model.graph.node)
        is_float = "--fp16" in options or name == "vision_encoder"
        floats = by_operator["MatMul"] if is_float else int(name == "llm")  # lm_head
        assert by_operator["MatMul"] - by_operator["DequantizeLinear"] == floats
    assert own == {alignment.CONTEXT_ATTENTION, alignment.ADD_LAYER_NORM, alignment.ADD_ROWS}


def test_the_kv_cache_is_updated_in_place(exported: Export) -> None:
    """Each layer scatters into its past cache; all layers share one mask."""
    folder = exported(PHI, "--fp16")
    graph = onnx.load(folder / "llm.onnx", load_external_data=False).graph
    scatters = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}
    layers = open_bundle(folder).manifest.model.language.layers
    assert scatters == {
        f"present.{layer}.{part}": f"past.{layer}.{part}" for layer in range(layers) for part in ("key", "value")
    }
    assert len({node.input[3] for node in graph.node if node.op_type == "Attention"}) == 1


def test_int4_scales_are_positive(exported: Export) -> None:
    """TensorRT requires positive scales."""
    folder = exported(PHI, *INT4[PHI])
    for name in ("alignment_decoder", "llm"):
        model = onnx.load(folder / f"{name}.onnx")
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
        assert dequantized
        for node in dequantized:
            assert len(node.input) == 2
            assert (numpy_helper.to_array(tensors[node.input[1]]) > 0).all()


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "options", "reason"),
    [
        (LLAMA, "--int4 --group-size 64", "llm.layers.0.mlp.down cannot be int4:64 for TensorRT: its 112 inputs are "),
        (PHI, "--int4", "cannot be int4:128 for TensorRT: its 64 inputs are not whole groups of 128"),
        (PHI, "--int4 --asym --group-size 32", "TensorRT: it supports no zero points; leave --asym out,"),
        (PHI, "--fp16 --rule llm.*=nf4:32", "TensorRT: it has no GEMMs with a codebook; use --int4,"),
        (PHI, "--fp16 --rule llm.*=fp4:32", "TensorRT: it has no GEMMs with a codebook; use --int4,"),
        (PHI, "--fp16 --rule llm.*=int8:32", "cannot be int8:32 for TensorRT: its 8-bit weights have one scale per"),
        (PHI, "--fp16 --rule llm.lm_head=uint8:32", "llm.lm_head cannot be uint8:32 for TensorRT: it supports no zero"),
        (PHI, "--fp16 --accuracy-level 4", "--accuracy-level is for ONNX Runtime"),
        (
            PHI,
            "--int8 --group-size 32",
            "--target tensorrt have one scale per channel: leave --group-size out",
        ),
    ],
)
def test_unsupported_formats(
    checkpoint: str, options: str, reason: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    arguments = [CHECKPOINTS[checkpoint], "-o", tmp_path / "b", "--target", "tensorrt", *options.split()]
    message = refused(cli.main, *arguments, code=2)
    assert reason in message
    assert not (tmp_path / "b").exists()


def test_odd_outputs() -> None:
    """TensorRT packs two outputs in a byte."""
    weight = Parameter("llm.lm_head.weight", "linear", (33, 64), ())
    with pytest.raises(UsageError, match=r"^llm.lm_head cannot be int4:64 for TensorRT: its 33 outputs are odd, and "):
        TENSORRT.check_formats({"llm.lm_head": Linear(weight, WeightFormat("int4", 64))})
