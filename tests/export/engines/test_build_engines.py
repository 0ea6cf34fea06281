"""``fusion-build`` with a fake TensorRT (``fake_tensorrt.py``)."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, JETPACK_6, RTX, FakeTensorRT
from fakes.on_fake_tensorrt import installed

from fusion_edge.export.bundle.folder_lock import locked_folder
from fusion_edge.export.engines import builder as engine_builder
from fusion_edge.export.engines import cli as cli_build
from fusion_edge.kernels import tensorrt_plugins
from fusion_edge.kernels.operators import DOMAIN
from fusion_edge.kernels.triton.ahead_of_time import KERNELS
from fusion_edge.kernels.triton.kernel_folder import KernelEntry, write_index
from fusion_edge.runtime.bundle.engine_manifest import ENGINES_MANIFEST
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER, read_engines
from fusion_edge.runtime.bundle.files import digest

Refuse = Callable[..., str]
ON_RTX = ("--library=tensorrt-rtx", "--parts=1")
ON_FULL = ("--library=tensorrt", "--parts=1")


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """Return a bundle to build engines for."""
    return Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny"))


def fake(library: tuple[str, str] = RTX, **machine: Any) -> FakeTensorRT:
    return FakeTensorRT(*library, FakeCuda(**machine))


def build(trt: FakeTensorRT, bundle: Path, *options: str) -> int:
    library = f"--library={trt.__name__.replace('_', '-')}"
    with installed(trt):
        return cli_build.main([str(bundle), library, "--parts=1", "--skip-comparison", *options])


def engines_of(bundle: Path) -> list[Path]:
    """Return the folders of engines, hidden ones included."""
    return (
        sorted(path for path in (bundle / ENGINES_FOLDER).iterdir() if path.is_dir())
        if (bundle / ENGINES_FOLDER).exists()
        else []
    )


# Builds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "operator", "told"),
    [
        (FULL, "plugin", ""),
        (
            ("tensorrt", "10.13.0"),
            "plugin",
            "tensorrt 10.13.0 does not support Attention, RMSNormalization, RotaryEmbedding, TensorScatter: "
            "decomposed, and slower.\n",
        ),
        (
            JETPACK_6,
            "function",
            "TensorRT 10.3 has no ahead-of-time plugins (needs 10.9): the recursive alignment runs as standard "
            "operators.\ntensorrt 10.3.0 does not support Attention, RMSNormalization, RotaryEmbedding, TensorScatter: "
            "decomposed, and slower.\n",
        ),
        (RTX, "function", "TensorRT-RTX has no plugins: the recursive alignment runs as standard operators.\n"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_plugins_or_functions_compute_alignment(
    bundle: Path,
    library: tuple[str, str],
    operator: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registered = []
    register = tensorrt_plugins.register

    def watched(module: ModuleType, architecture: str, *source: Any) -> None:
        registered.append((module, architecture))
        register(module, architecture, *source)

    monkeypatch.setattr(tensorrt_plugins, "register", watched)
    trt = fake(library)
    assert build(trt, bundle) == 0
    assert capsys.readouterr().err == told
    assert registered == ([(trt.plugin, "86")] if operator == "plugin" else [])
    (folder,) = engines_of(bundle)
    assert read_engines(folder).operator == operator
    for config in trt.built:
        nodes = [node for node in config.model.graph.node if node.op_type in ("AddRows", "ContextAttention")]
        names = {function.name for function in config.model.functions if function.domain == DOMAIN}
        if operator == "plugin":
            assert config.features == {trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03}
            assert all({"plugin_namespace", "aot"} <= {one.name for one in node.attribute} for node in nodes)
            assert not names & {node.op_type for node in nodes}
        else:
            assert not config.features
            assert {node.op_type for node in nodes} <= names
    assert any(node.op_type == "AddRows" for config in trt.built for node in config.model.graph.node)


def test_tensorrt_build_configuration(bundle: Path) -> None:
    trt = fake()
    assert build(trt, bundle, "--device=12.0", "--workspace=512MB", "--max-context=256") == 0
    assert [config.pools for config in trt.built] == [{trt.MemoryPoolType.WORKSPACE: 512_000_000}] * 3
    assert [capability.name for config in trt.built for capability in config.capabilities.values()] == ["SM120"] * 3
    assert [config.flags_set for config in trt.built] == [{trt.BuilderFlag.REQUIRE_USER_ALLOCATION}] * 3
    (folder,) = engines_of(bundle)
    assert "-cc12.0-" in folder.name
    built = read_engines(folder)
    assert (built.max_context, built.workspace, built.parts) == (256, 512_000_000, 1)
    prompts, steps = built.engines["llm"][0].profiles
    assert prompts["positions"][2] == 256
    assert (steps["positions"], steps["latents"], steps["questions"]) == ((1, 1, 1), (0, 0, 0), (0, 0, 0))


def test_engines_that_are_up_to_date_are_kept(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trt = fake()
    for options, engines, said in [
        ([], 3, "built in"),
        ([], 0, "up to date"),
        (["--force"], 3, "built in"),
        (["--max-context=256"], 3, "built in"),
        (["--max-context=256"], 0, "up to date"),
        (["--max-context=256", "--parts=2"], 4, "built in"),
        (["--max-context=256", "--parts=2", "--workspace=1GB"], 4, "built in"),
        (["--max-context=256", "--parts=2", "--workspace=1GB"], 0, "up to date"),
        ([], 3, "built in"),
    ]:
        trt.built.clear()
        capsys.readouterr()
        assert build(trt, bundle, *options) == 0
        assert len(trt.built) == engines
        assert said in capsys.readouterr().out
        assert len(engines_of(bundle)) == 1
    (folder,) = engines_of(bundle)
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.engine" for name in ("vision_encoder", "alignment_decoder", "llm")),
        ENGINES_MANIFEST,
    }


def kernel_folder(folder: Path, *kernels: str) -> Path:
    """Write kernels of dummy PTX, for the tiny bundle's width and compute capability 8.6."""
    folder.mkdir()
    entries = []
    for kernel in kernels:
        path = folder / f"{kernel}.ptx"
        path.write_text(f".entry {kernel}()")
        entries.append(KernelEntry(kernel, "86", 32, "fp16", path.name, digest(path), kernel, 128, 0))
    write_index(folder, entries)
    return folder


def test_rebuild_when_kernels_become_available(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines without plugins are not up to date once plugins are available."""
    monkeypatch.setattr(tensorrt_plugins, "find_spec", lambda name: None)  # neither torch nor Triton
    with_kernels = f"--kernels={kernel_folder(tmp_path / 'kernels', *KERNELS)}"
    for options, operator, engines in [
        ([], "function", 3),
        ([with_kernels], "plugin", 3),
        ([with_kernels], "plugin", 0),
        ([], "function", 3),
    ]:
        trt = fake(FULL)
        assert build(trt, bundle, *options) == 0
        (folder,) = engines_of(bundle)
        assert (read_engines(folder).operator, len(trt.built)) == (operator, engines)


def test_missing_kernels(bundle: Path, tmp_path: Path, refused: Refuse) -> None:
    """The error is raised before the build."""
    folder, trt = kernel_folder(tmp_path / "kernels", "add_rows"), fake(FULL)
    with installed(trt):
        message = refused(cli_build.main, bundle, *ON_FULL, "--kernels", folder)
    assert f"{folder} has no context_attention for sm_86, width 32 and fp16; make it with:" in message
    assert not trt.built


def test_kernels_require_plugins(bundle: Path, refused: Refuse) -> None:
    for trt, reason in (
        (fake(RTX), "TensorRT-RTX has no plugins"),
        (fake(FULL, compute_capability="7.5"), "There are no kernels for sm_75"),
    ):
        assert build(trt, bundle) == 0
        (folder,) = engines_of(bundle)
        assert read_engines(folder).operator == "function"
        library = trt.__name__.replace("_", "-")
        with installed(trt):
            message = refused(cli_build.main, bundle, f"--library={library}", "--parts=1", "--kernels=none", code=2)
        assert message.startswith(f"error: --kernels cannot be used ({reason}")
        shutil.rmtree(folder)


def test_timing_cache_is_kept(bundle: Path) -> None:
    """There is one cache per version and compute capability. It outlives the engines, and the next build reads it."""
    kept = bundle / ENGINES_FOLDER / "tensorrt-10.16.0-cc8.6.timing"
    for content in (b"vision_encoder alignment_decoder llm ", b"vision_encoder alignment_decoder llm " * 2):
        assert build(fake(FULL), bundle, "--force") == 0
        assert kept.read_bytes() == content
    for unusable in (b"damaged", b"another GPU's of this compute capability"):
        kept.write_bytes(unusable)
        assert build(fake(FULL), bundle, "--force") == 0
        assert kept.read_bytes() == b"vision_encoder alignment_decoder llm "
    assert build(fake(FULL, compute_capability="8.7"), bundle) == 0
    assert len(list((bundle / ENGINES_FOLDER).glob("*.timing"))) == 2
    assert build(fake(RTX), bundle) == 0
    assert len(list((bundle / ENGINES_FOLDER).glob("*.timing"))) == 2


def test_attention_without_a_fused_kernel(bundle: Path) -> None:
    """TensorRT may decompose every Attention."""
    trt = fake()
    trt.has_fused_attention = False
    assert build(trt, bundle) == 0
    nodes = [node for config in trt.built for node in config.model.graph.node if node.op_type == "Attention"]
    assert len(nodes) > 1
    for node in nodes:
        assert [one.i for one in node.attribute if one.name == "TRT_decomposable"] == [1]


def test_the_bundle_keeps_its_attention(bundle: Path) -> None:
    """Only the graph that is built has the attribute, which ONNX Runtime does not know."""
    before = {path.name: path.read_bytes() for path in bundle.glob("*.onnx")}
    assert build(fake(), bundle) == 0
    assert {path.name: path.read_bytes() for path in bundle.glob("*.onnx")} == before


# Failures during a build -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["parse_error", "build_error"])
def test_tensorrt_fails_to_build(bundle: Path, failure: str, refused: Refuse) -> None:
    trt = fake(FULL)
    assert build(trt, bundle) == 0
    before = {path: path.read_bytes() for path in (bundle / ENGINES_FOLDER).rglob("*") if path.is_file()}
    setattr(trt, failure, "Internal Error:\n  out of memory.")
    with installed(trt):
        message = refused(cli_build.main, bundle, *ON_FULL, "--max-context=256")
    assert "tensorrt 10.16.0 cannot build vision_encoder for compute capability 8.6: Internal Error:" in message
    remedy = "build with more --parts, or a smaller --max-block, --max-context or --workspace."
    assert message.endswith(f"Memory ran out; {remedy}\n")
    assert {path: path.read_bytes() for path in (bundle / ENGINES_FOLDER).rglob("*") if path.is_file()} == before


def test_ctrl_c(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trt = fake()
    trt.on_step = lambda: os.kill(os.getpid(), signal.SIGINT)
    handler = signal.getsignal(signal.SIGINT)
    assert build(trt, bundle) == 130
    assert capsys.readouterr().err.endswith("operators.\ninterrupted\n")
    assert not engines_of(bundle)
    assert signal.getsignal(signal.SIGINT) is handler


def test_small_disk(bundle: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    trt = fake()
    with installed(trt):
        message = refused(cli_build.main, bundle, *ON_RTX)
    assert message.startswith(f"error: The disk of {bundle} has 1.00 MB free; the engines need about ")
    assert not trt.built


def test_disk_becomes_full(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine_builder, "digest", fail)
    assert build(fake(FULL), bundle) == 1
    message = f"The disk of {bundle / ENGINES_FOLDER} is full; free some space and build again."
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not engines_of(bundle)


def test_two_builds_at_once(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trt = fake(FULL)
    assert build(trt, bundle) == 0
    (folder,) = engines_of(bundle)
    with locked_folder(folder.parent / f".{folder.name}.partial", ""):
        assert build(trt, bundle, "--force") == 1
    assert f"Another build is writing {folder}; wait for it" in capsys.readouterr().err


# Refused before a build ------------------------------------------------------------------------------------------


def test_bundle_for_another_target_is_refused(tiny_bundle: Path, refused: Refuse) -> None:
    message = refused(cli_build.main, tiny_bundle)
    assert message == (
        f"error: {tiny_bundle} was exported for cpu; expected tensorrt. Run fusion-export FUSION-tiny -o FOLDER "
        "--target tensorrt and build from that folder.\n"
    )


def test_no_library(bundle: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse) -> None:
    """The error says what to install: the requested library, or either one."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    full = "on a Jetson it comes with JetPack"
    rtx = "pip install '.[tensorrt-rtx]' in a clone of fusion-edge"
    assert f"tensorrt is not installed; {full}" in refused(cli_build.main, bundle, "--library=tensorrt")
    assert f"tensorrt-rtx is not installed; {rtx}" in refused(cli_build.main, bundle, "--library=tensorrt-rtx")
    message = refused(cli_build.main, bundle)
    assert message.startswith(f"error: TensorRT is not installed: tensorrt is not installed; {full}")
    assert f" tensorrt-rtx is not installed; {rtx}" in message


def test_library_fails_to_load(bundle: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse) -> None:
    def fail(name: str) -> object:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("fusion_edge.runtime.backends.tensorrt.library.importlib.import_module", fail)
    for options in ([], ["--library=tensorrt"]):
        message = refused(cli_build.main, bundle, *options)
        assert "tensorrt is not installed or does not load (libnvinfer.so.10: cannot open shared object fi" in message


@pytest.mark.parametrize(
    ("library", "machine", "options", "code", "reason"),
    [
        (RTX, {}, ["--device=7.0"], 1, "Compute capability 7.0 is too old: tensorrt_rtx requires 7.5 or later. Run a "),
        (
            FULL,
            {"compute_capability": "5.3"},
            [],
            1,
            "Compute capability 5.3 is too old: tensorrt requires 7.5",
        ),
        (
            RTX,
            {},
            ["--device=8.8"],
            1,
            "tensorrt_rtx 1.7.1.116 does not support compute capability 8.8; pass",
        ),
        (RTX, {"gpus": 0}, [], 1, "For another GPU, pass its compute capability, such as --device 8.6."),
        (FULL, {"gpus": 0}, [], 1, "CUDA finds no GPU; check nvidia-smi. For another GPU, build on its machine."),
        (FULL, {}, ["--device=8.6"], 2, "--device requires tensorrt-rtx: tensorrt builds only for this machine's GPU."),
        (RTX, {}, ["--max-context=47"], 2, "--max-context 47 is out of range for this bundle; choose 48 (image tokens"),
        (RTX, {}, ["--max-context=513"], 2, "a short question) to 512 (the bundle's)."),
    ],
)
def test_unsupported_machines_and_options(
    bundle: Path,
    refused: Refuse,
    library: tuple[str, str],
    machine: dict[str, Any],
    options: list[str],
    code: int,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trt = fake(library, **machine)
    assert build(trt, bundle, *options) == code
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert reason in message
    assert not engines_of(bundle)
    assert not trt.built


@pytest.mark.parametrize("options", [["--device=ampere"], ["--parts=0"], ["--library=onnx"], ["--workspace=some"]])
def test_wrong_options(bundle: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli_build.main([str(bundle), *options])
    assert stopped.value.code == 2
