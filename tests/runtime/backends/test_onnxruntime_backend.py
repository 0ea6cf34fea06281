"""The bound buffers of the ONNX Runtime backend: bit-equal to plain runs, without binding or copies per step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from support.backend_contract import CAPACITY, Subject

from fusion_edge.export import cli
from fusion_edge.runtime import FusionError, load
from fusion_edge.runtime.backends.base import ImageAlignment, Interruptible
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.backends.onnxruntime.graph import Graph, has_vnni
from fusion_edge.runtime.bundle import graphs
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.errors import DeviceError
from fusion_edge.runtime.images.grids import pooling_cells

Array = npt.NDArray[Any]


class PlainRuns:
    """Reference: the graphs by ``InferenceSession.run``, with the cache as arrays."""

    def __init__(self, bundle: Bundle) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if cpu_kernels.can_run(bundle.manifest, graphs.LLM):  # also true for the other graphs
            options.register_custom_ops_library(str(cpu_kernels.library()))
        self._sessions = {
            name: ort.InferenceSession(bundle.folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in bundle.manifest.graphs
        }
        manifest = bundle.manifest
        specs = graphs.graph_specs(manifest.model, manifest.target, manifest.activations, manifest.cache)
        self._specs = {spec.name: spec for spec in specs}
        self.cache: dict[str, Array] = {}

    def run(self, name: str, **inputs: Array) -> list[Array]:
        feeds = {spec.name: spec.dtype for spec in self._specs[name].inputs if spec.name in inputs}
        arrays = {feed: np.asarray(inputs[feed], dtype) for feed, dtype in feeds.items()}
        outputs: Any = self._sessions[name].run(None, arrays | self.cache if name == graphs.LLM else arrays)
        return list(outputs)

    def llm(self, rows: Array, length: int, is_prefill: bool, **alignment: Array) -> Array:
        """Return the logits of the last of ``rows``; the cache then has ``length`` tokens."""
        if is_prefill:
            self.cache = {
                spec.name: np.zeros([CAPACITY if isinstance(size, str) else size for size in spec.shape], spec.dtype)
                for spec in self._specs[graphs.LLM].inputs
                if spec.name.startswith("past.")
            }
        lengths = {"last_position": [length - 1], "total_length": length, "is_prefill": is_prefill}
        scalars = {name: np.array(value) for name, value in lengths.items()}
        logits, *present = self.run(graphs.LLM, embeddings=rows[None], **alignment, **scalars)
        self.cache = dict(zip(self.cache, present, strict=True))
        last: Array = logits[0]
        return last


@pytest.fixture(scope="module", params=["--int4", "--fp32 --kv-cache int8", "--fp16 --target cuda"])
def bundle(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), *request.param.split()]) == 0
    return open_bundle(folder)


@pytest.fixture(scope="module")
def subject(bundle: Bundle) -> Subject:
    return Subject(OnnxRuntimeBackend(bundle, "cpu", 1), bundle.manifest, 0)


def test_bound_buffers_equal_plain_runs_bit_by_bit(bundle: Bundle, subject: Subject) -> None:
    plain = PlainRuns(bundle)
    features = subject.encode(4, 0)
    image = subject.align(features, 4)
    rows, latents, questions = subject.prompt(image, 2)
    grid, window = bundle.manifest.model.vision.grid, bundle.manifest.model.alignment.window_size
    cells = {"latent_cells": pooling_cells(2 * grid, 2), "context_cells": pooling_cells(2 * grid, 2 * window)}
    first, keys, values = plain.run(graphs.ALIGNMENT_DECODER, features=np.asarray(features), **cells)
    assert np.array_equal(image.latents, first[0])
    assert np.array_equal(np.asarray(image.keys), keys)
    assert np.array_equal(np.asarray(image.values), values)
    alignment = {"latent_positions": latents, "question_positions": questions, "keys": keys, "values": values}
    none = {
        "latent_positions": np.zeros((0, 0)),
        "question_positions": np.zeros(0),
        "keys": keys[:, :0],
        "values": values[:, :0],
    }
    for _ in range(2):  # the second time over values of the first
        logits = subject.backend.prefill(rows[:-3], image, latents, questions, CAPACITY)
        assert np.array_equal(logits, plain.llm(rows[:-3], len(rows) - 3, True, **alignment))
        for length in range(len(rows) - 2, len(rows) + 1):
            row = rows[length - 1]
            assert np.array_equal(subject.backend.decode(row), plain.llm(row[None], length, False, **none))


def test_features_equal_a_plain_run(bundle: Bundle, subject: Subject) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(1, 3, 384, 384)).astype(np.float32)
    words = rng.normal(size=(1, 5, subject.width)).astype(np.float32)
    mask = np.array([[True, True, True, True, False]])
    (expected,) = PlainRuns(bundle).run(graphs.VISION_ENCODER, pixel_values=pixels, text_embeds=words, text_mask=mask)
    assert np.array_equal(np.asarray(subject.backend.encode(pixels, words, mask)), expected)


def test_a_decode_step_binds_and_allocates_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = subject.start()
    before = subject.backend.decode(rows[0]).copy()

    def refuse(*_: object) -> None:
        raise AssertionError("bound or allocated")

    for name in ("tensor", "binding", "bind_in_place", "_allocate"):
        monkeypatch.setattr(Graph, name, refuse)
    for name in ("ortvalue_from_numpy", "ortvalue_from_shape_and_type"):
        monkeypatch.setattr(ort.OrtValue, name, refuse)
    assert not np.array_equal(subject.backend.decode(rows[1]), before)


@pytest.mark.parametrize("are_long", [False, True])
def test_options_of_decode_steps(subject: Subject, monkeypatch: pytest.MonkeyPatch, are_long: bool) -> None:
    """Run options slow ONNX Runtime down. Long runs need them to be interruptible."""
    options: list[object] = []
    run = ort.InferenceSession.run_with_iobinding

    def watched(session: ort.InferenceSession, binding: Any, run_options: Any = None) -> None:
        options.append(run_options)
        run(session, binding, run_options)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", watched)
    monkeypatch.setattr(subject.backend._llm, "_has_long_steps", are_long)  # type: ignore[attr-defined]
    rows = subject.start()
    assert options
    assert all(isinstance(one, ort.RunOptions) for one in options)
    options.clear()
    subject.backend.decode(rows[0])
    assert [isinstance(one, ort.RunOptions) for one in options] == [are_long]


def test_interrupt_and_resume(subject: Subject) -> None:
    """Runs fail between the two calls, and an interrupted sequence starts again with the same logits."""
    image = subject.image()
    rows, latents, questions = subject.prompt(image, 1)
    expected = subject.backend.prefill(rows, image, latents, questions, CAPACITY).copy()
    assert isinstance(subject.backend, Interruptible)
    subject.backend.interrupt()
    for fail in (subject.image, lambda: subject.backend.prefill(rows, image, latents, questions, CAPACITY)):
        with pytest.raises(FusionError, match=r"ONNX Runtime failed while running .*terminate"):
            fail()
    subject.backend.resume()
    assert np.array_equal(subject.backend.prefill(rows, image, latents, questions, CAPACITY), expected)


def test_a_decode_step_writes_one_position_of_the_cache(subject: Subject) -> None:
    """A decode step changes the memory of one token only."""
    rows = subject.start()
    language = subject.manifest.model.language
    shape = language.kv_heads, CAPACITY, language.head_dim
    decoder = subject.backend._llm  # type: ignore[attr-defined]
    before = decoder._memory["1.key"].numpy().copy()
    subject.backend.decode(-rows[0])  # a value of no other test
    after = decoder._memory["1.key"].numpy()
    used = math.prod(shape)
    changed = (after[:used] != before[:used]).reshape(shape).any(axis=(0, 2))
    assert np.flatnonzero(changed).tolist() == [len(rows)]
    assert np.array_equal(after[used:], before[used:])


def test_no_decode_step_copies_the_cache(subject: Subject) -> None:
    """A cache of eight times the capacity does not slow steps down: they touch only used memory."""
    fastest = []
    for capacity in (CAPACITY, subject.manifest.max_context):
        rows = subject.start(capacity)
        seconds = []
        for _ in range(4):
            begun = time.perf_counter()
            subject.backend.decode(rows[0])
            seconds.append(time.perf_counter() - begun)
        fastest.append(min(seconds))  # the minimum excludes other load of the machine
    assert fastest[1] < 3 * fastest[0]


def test_a_sequence_fits_the_context(subject: Subject) -> None:
    """A capacity above the context is refused, and the previous sequence continues."""
    rows = subject.start()
    context = subject.manifest.max_context
    with pytest.raises(FusionError, match=f"{context + 1} tokens exceeds the bundle's context of {context}"):
        subject.start(context + 1)
    assert np.isfinite(subject.backend.decode(rows[0])).all()


def test_a_failure_inside_onnxruntime_names_the_graph(subject: Subject) -> None:
    cells, rows = np.zeros((1, 1), np.int64), np.zeros((2, 32), np.float32)
    image = ImageAlignment(rows[:0], rows[0], rows[0])
    failures: dict[str, Callable[[], object]] = {
        "alignment_decoder": lambda: subject.backend.align(rows[None], cells, cells),
        "llm": lambda: subject.backend.prefill(rows, image, cells, cells[0], 8),
    }
    for graph, fail in failures.items():
        with pytest.raises(FusionError, match=f"^ONNX Runtime failed while running {graph}: .* fusion-info") as failure:
            fail()
        assert str(failure.value).count("ONNX Runtime failed") == 1


def test_the_cache_does_not_fit_in_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 50331648")

    monkeypatch.setattr(Graph, "tensor", fail)
    told = r"not enough memory to run llm \(50 MB are needed, [\d,]+ MB are available\); .* a smaller --max-context"
    with pytest.raises(FusionError, match=told):
        OnnxRuntimeBackend(bundle, "cpu", 1)


@pytest.mark.parametrize(
    ("spin", "version", "expected"),
    [
        (False, "1.31.1", {"spin_duration_us": "100"}),
        (False, "1.26.0", {"spin_duration_us": "100"}),
        (False, "1.25.1", {"spin_duration_us": "100", "allow_spinning": "0"}),
        (True, "1.31.1", {}),
        (True, "1.25.1", {}),
    ],
)
def test_idle_threads_sleep_soon(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, spin: bool, version: str, expected: dict[str, str]
) -> None:
    """In every graph's session, through ``load`` and ``fusion-run``; older releases have no time limit of spinning."""
    monkeypatch.setattr(ort, "__version__", version)
    spinning, session = [], ort.InferenceSession

    def record(path: str, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
        spinning.append({name: value for name in NAMES if (value := entry(options, name)) is not None})
        return session(path, options, **others)

    monkeypatch.setattr(ort, "InferenceSession", record)
    given: Any = {"spin": True} if spin else {}
    load(tiny_bundle, device="cpu", **given).close()
    question = ["--image", "absent.png", "--ask=What?", *(["--spin"] if spin else [])]
    assert cli_run.main([str(tiny_bundle), *question]) == 1
    assert spinning == 6 * [expected]


NAMES = ("spin_duration_us", "allow_spinning")


def entry(options: ort.SessionOptions, name: str) -> str | None:
    """Return an option of idle threads; None if it has its default."""
    with suppress(RuntimeError):  # not set
        return str(options.get_session_config_entry(f"session.intra_op.{name}"))
    return None


# The CUDA provider -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "remedy"),
    [
        ("", "upgrade the GPU driver, or install the onnxruntime-gpu that fits it."),
        (
            "Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file\n"
            "Failed to load libcudnn.so.9: libcudnn.so.9: cannot open shared object file\n"
            "Please follow the installation page.\n",
            "libcublas.so.13, libcudnn.so.9 cannot be loaded: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them.",
        ),
    ],
)
def test_a_provider_that_does_not_start(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], printed: str, remedy: str
) -> None:
    """ONNX Runtime itself would continue on the CPU."""
    monkeypatch.setattr(ort, "preload_dlls", lambda: sys.stdout.write(printed))
    provider = "CUDAExecutionProvider"
    with pytest.raises(DeviceError) as refusal, pytest.warns(match=provider):
        OnnxRuntimeBackend(open_bundle(tiny_bundle), "cuda", 1)
    assert str(refusal.value) == f"ONNX Runtime {ort.__version__} could not start its {provider}; {remedy}"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2 fma\n", False),
        ("Features\t: fp asimd\n", False),
    ],
)
def test_processors_with_vnni(cpuinfo: str, expected: bool) -> None:
    assert has_vnni(cpuinfo) is expected
