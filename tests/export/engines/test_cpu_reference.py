"""``fusion-build --write-reference`` and ``--reference``: engines are compared with the CPU of another machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import JETPACK_6, FakeTensorRT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compared_engines import STAGES, build, changed, engines_of, fake, folders, half
from support.opset24 import needs_opset_24

from fusion_edge.export.engines import cli as cli_build
from fusion_edge.export.engines import cpu_reference, engine_check, engine_folder, stage_outputs
from fusion_edge.export.engines.cpu_reference import read_reference
from fusion_edge.export.engines.stage_outputs import StageOutputs, StageRunner
from fusion_edge.runtime.backends.onnxruntime import backend as onnxruntime_backend
from fusion_edge.runtime.backends.onnxruntime import library as onnxruntime_library
from fusion_edge.runtime.backends.tensorrt import backend as tensorrt_backend
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.errors import DeviceError, FusionError
from fusion_edge.runtime.system.jetson import Jetson

pytestmark = needs_opset_24
Refused = Callable[..., str]
NANO = Jetson("NVIDIA Jetson Orin Nano Developer Kit", 7_650_000_000)
AGX = Jetson("NVIDIA Jetson AGX Orin Developer Kit", 64_000_000_000)


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def reference(tiny_tensorrt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU's outputs of ``tiny_tensorrt_bundle``, written without TensorRT and CUDA. Read-only."""
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    with pytest.MonkeyPatch.context() as patch:
        for module in ("tensorrt", "tensorrt_rtx", "cuda.bindings.runtime"):
            patch.setitem(sys.modules, module, None)
        assert cli_build.main([str(tiny_tensorrt_bundle), f"--write-reference={path}"]) == 0
    return path


@pytest.fixture
def no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine be too small for the bundle on the CPU, without ONNX Runtime for it, and fail where it is used.

    The fake TensorRT computes with ONNX Runtime itself.
    """

    def fail(*_: object) -> Any:
        raise DeviceError("ONNX Runtime is not installed.")

    def loaded(*_: object) -> Any:
        raise AssertionError("the bundle was loaded on the CPU")

    monkeypatch.setattr(onnxruntime_library, "find_onnxruntime", fail)
    monkeypatch.setattr(cpu_reference, "find_onnxruntime", fail)
    monkeypatch.setattr(onnxruntime_backend, "OnnxRuntimeBackend", loaded)
    monkeypatch.setattr(engine_check, "available_memory", lambda: 0)


def jetson(monkeypatch: pytest.MonkeyPatch, here: Jetson, **machine: Any) -> FakeTensorRT:
    """Let this machine be an Orin with JetPack 6, and return its TensorRT."""
    for module in (cli_build, engine_folder, tensorrt_backend):
        monkeypatch.setattr(module, "this_jetson", lambda: here)
    return FakeTensorRT(*JETPACK_6, FakeCuda(compute_capability="8.7", **machine))


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


# Compare ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_cpu")
def test_equal_engines(
    bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage is compared as with this machine's CPU, which is not used."""
    trt = jetson(monkeypatch, NANO)
    assert build(trt, bundle, f"--reference={reference}", "--json", "--skip-memory-check") == 0
    check = json.loads(capsys.readouterr().out)["check"]
    assert check["skipped"] is None
    assert check["reference"].startswith("ONNX Runtime 1.")
    assert [one["stage"] for one in check["stages"]] == STAGES
    assert all(0 <= one["relative_error"] < one["limit"] / 4 for one in check["stages"])
    assert [one["logits"]["tokens"] for one in check["stages"] if one["logits"]] == [1, 8, 1]
    assert cli_info.main([str(bundle)]) == 0
    assert f"with {check['reference']}: {STAGES[0]} " in capsys.readouterr().out
    assert build(trt, bundle, "--skip-memory-check") == 0
    assert f"\ncompared with {check['reference']}  " in capsys.readouterr().out


def test_the_outputs_are_those_of_this_cpu(bundle: Path, reference: Path) -> None:
    """So the comparison finds the same differences."""
    assert build(fake(), bundle) == 0
    expected = engines_of(bundle).check
    assert build(fake(), bundle, "--force", f"--reference={reference}") == 0
    assert engines_of(bundle).check.stages == expected.stages


@pytest.mark.usefixtures("no_cpu")
def test_different_engines(
    bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage and the difference are named, and the engines are not kept."""
    changed(monkeypatch, "features", half)
    assert build(fake(), bundle, f"--reference={reference}") == 1
    message = last_error(capsys)
    assert f" are wrong in {STAGES[0]}: they differ from the CPU by more than rounding (relative error 0.5, " in message
    assert folders(bundle) == []


@pytest.mark.usefixtures("no_cpu")
def test_a_smaller_context(bundle: Path, reference: Path) -> None:
    """It may end before the last step of the reference, or have no room for the question."""
    manifest = open_bundle(bundle).manifest
    least = next(size for size in range(manifest.minimum_context, manifest.max_context) if fits(bundle, size))
    assert build(fake(), bundle, f"--reference={reference}", f"--max-context={least + 2}") == 0
    assert [one.logits.tokens for one in engines_of(bundle).check.stages if one.logits] == [1, 3, 1]
    assert build(fake(), bundle, f"--reference={reference}", f"--max-context={least - 1}") == 0
    check = engines_of(bundle).check
    assert (check.stages, check.is_final) == ((), True)
    assert str(check.skipped).startswith("The context is too small: The prompt has ")


def fits(bundle: Path, max_context: int) -> bool:
    try:
        StageRunner(open_bundle(bundle), max_context).check_context()
    except FusionError:
        return False
    return True


@pytest.mark.usefixtures("no_cpu")
def test_engines_of_another_orin(
    bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were compared there, and are compared again where they run."""
    assert build(jetson(monkeypatch, AGX), bundle, "--for=orin-nano", f"--reference={reference}") == 0
    before = engines_of(bundle).check
    assert before.skipped is None
    trt = jetson(monkeypatch, NANO)
    assert build(trt, bundle, f"--reference={reference}") == 0
    assert not trt.built
    assert trt.loaded
    assert engines_of(bundle).check == before
    capsys.readouterr()
    assert build(jetson(monkeypatch, NANO, free=1 << 20), bundle, f"--reference={reference}") == 0
    assert "not compared with the CPU: The engines need about " in capsys.readouterr().out
    assert engines_of(bundle).check == before  # of the other machine
    changed(monkeypatch, "features", half)
    assert build(jetson(monkeypatch, NANO), bundle, f"--reference={reference}") == 1
    assert last_error(capsys).endswith(" The engines are deleted.")
    assert folders(bundle) == []


def test_without_the_gpu_nothing_is_compared(bundle: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert build(fake(), bundle, "--device=8.9", f"--reference={reference}") == 0
        reason = "This machine's GPU has compute capability 8.6, and the engines are for another."
        assert f"not compared with the CPU: {reason}\n" in capsys.readouterr().out


def test_reading_does_not_import_onnxruntime(tiny_tensorrt_bundle: Path, reference: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fusion_edge.runtime.bundle.reader import open_bundle; "
        "from fusion_edge.export.engines.cpu_reference import read_reference; "
        "read_reference(open_bundle(Path(sys.argv[1])), Path(sys.argv[2])); "
        "sys.exit('onnxruntime' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_tensorrt_bundle), str(reference)], check=True)


# Files that do not fit --------------------------------------------------------------------------------------------


def refusal(bundle: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error for a file; nothing is built."""
    trt = fake()
    assert build(trt, bundle, f"--reference={path}") == 1
    assert not trt.built
    assert not (bundle / ENGINES_FOLDER).exists()
    return last_error(capsys)


def test_another_bundle(bundle: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (bundle / MANIFEST).open("a") as file:
        file.write("\n")
    assert refusal(bundle, reference, capsys) == (
        f"error: {reference} has the outputs of another bundle than {bundle}; write it again on a workstation: "
        f"fusion-build {bundle} --write-reference {reference} --force"
    )


def test_another_question(
    bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_outputs, "QUESTION", "What is that?")
    assert f"{reference} has the outputs of another question, " in refusal(bundle, reference, capsys)


def write_array(path: Path, _: StageOutputs) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_objects(path: Path, outputs: StageOutputs) -> None:
    """Pickles, which could run code."""
    texts = dict.fromkeys(("bundle", "question", "made_by"), "")
    np.savez(path, **outputs.arrays() | {"steps": np.array([{}])} | texts)


def write_flat(path: Path, outputs: StageOutputs) -> None:
    texts = dict.fromkeys(("bundle", "question", "made_by"), "")
    np.savez(path, **outputs.arrays() | {"steps": np.zeros(3)} | texts)


@pytest.mark.parametrize(
    "write",
    [
        lambda path, _: path.write_bytes(b""),
        lambda path, _: path.write_text("not compared"),
        lambda path, outputs: outputs.save(path),
        write_array,
        write_objects,
        write_flat,
    ],
    ids=["empty", "text", "outputs alone", "one array", "objects", "other dimensions"],
)
def test_foreign_files(
    bundle: Path,
    reference: Path,
    tmp_path: Path,
    write: Callable[[Path, StageOutputs], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "foreign.npz"
    write(path, read_reference(open_bundle(bundle), reference).outputs)
    assert f"{path} is damaged, or not a file of --write-reference; write it " in refusal(bundle, path, capsys)


def test_no_file(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, reason in ((tmp_path / "none.npz", "No such file or directory"), (tmp_path, "Is a directory")):
        assert refusal(bundle, path, capsys).startswith(f"error: Cannot access {path}: {reason};")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_files(
    tiny_tensorrt_bundle: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A changed bit is found, unless it is in what nobody reads; a cut file is always found."""
    bundle, content = open_bundle(tiny_tensorrt_bundle), bytearray(reference.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 1500, len(content) - 1))
    is_cut = data.draw(st.booleans())
    if is_cut:
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("damaged") / "reference.npz"
    path.write_bytes(content)
    try:
        found = read_reference(bundle, path)
    except FusionError:
        return
    finally:
        path.unlink()
    assert not is_cut
    expected = read_reference(bundle, reference)
    assert found.made_by == expected.made_by
    for name, array in expected.outputs.arrays().items():
        assert np.array_equal(found.outputs.arrays()[name], array)


# Write ------------------------------------------------------------------------------------------------------------


def test_json_and_existing_files(
    tiny_tensorrt_bundle: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reference.npz"
    path.write_text("mine")
    command = [str(tiny_tensorrt_bundle), f"--write-reference={path}"]
    message = refused(cli_build.main, *command)
    assert message == f"error: {path} exists; choose another file or pass --force to replace it.\n"
    assert path.read_text() == "mine"
    assert cli_build.main([*command, "--force", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "reference": str(path),
        "bytes": path.stat().st_size,
        "made_by": read_reference(open_bundle(tiny_tensorrt_bundle), path).made_by,
    }
    assert not (tiny_tensorrt_bundle / ENGINES_FOLDER).exists()


def test_a_reference_that_cannot_be_written(
    tiny_tensorrt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    command = (tiny_tensorrt_bundle, f"--write-reference={tmp_path / 'reference.npz'}")
    message = refused(cli_build.main, tiny_tensorrt_bundle, f"--write-reference={tmp_path / 'no/reference.npz'}")
    assert message.startswith(f"error: {tmp_path / 'no'} is not a folder;")
    with monkeypatch.context() as patch:
        patch.setattr(engine_check, "available_memory", lambda: 1)
        message = refused(cli_build.main, *command)
    assert message.startswith("error: A reference cannot be written: There is not enough memory to run the bundle on ")
    with monkeypatch.context() as patch:
        patch.setattr(engine_check, "opset_24_unsupported_reason", lambda: "ONNX Runtime 1.23.2 has no opset 24.")
        message = refused(cli_build.main, *command)
    assert message == "error: A reference cannot be written: ONNX Runtime 1.23.2 has no opset 24.\n"
    with monkeypatch.context() as patch:
        patch.setattr(engine_check, "incomparable_reason", lambda _: "Activations in nvfp4 have 4 bits.")
        message = refused(cli_build.main, *command)
    assert message == "error: A reference cannot be written: Activations in nvfp4 have 4 bits.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_has_no_reference(bundle: Path, tmp_path: Path, refused: Refused) -> None:
    (data,) = (path for path in bundle.iterdir() if path.suffix == ".data" and path.stem.startswith("llm"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    message = refused(cli_build.main, bundle, f"--write-reference={tmp_path / 'reference.npz'}")
    assert message.startswith(f"error: {data} has been altered:")
    assert not (tmp_path / "reference.npz").exists()


@pytest.mark.parametrize("other", ["--reference=a.npz", "--skip-comparison"])
def test_options_that_exclude_each_other(bundle: Path, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli_build.main([str(bundle), "--write-reference=b.npz", other])
    assert stopped.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--library=tensorrt-rtx", "--device=8.6", "--max-context=64", "--workspace=1GB", "--parts=2", "--max-block=1GB",
     "--for=orin-nano", "--skip-memory-check", "--kernels=kernels", "--verbose"],
)  # fmt: skip
def test_options_of_builds_with_write_reference(
    tiny_tensorrt_bundle: Path, tmp_path: Path, refused: Refused, option: str
) -> None:
    written = tmp_path / "reference.npz"
    message = refused(cli_build.main, tiny_tensorrt_bundle, f"--write-reference={written}", option, code=2)
    assert f"{option.partition('=')[0]} is about building, and --write-reference builds nothing" in message
    assert not written.exists()
