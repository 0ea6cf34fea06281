"""Invalid engines: TensorRT never receives them, and the error names the command that builds them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import FULL, RTX, FakeTensorRT
from fakes.on_fake_tensorrt import build, open_backend
from support.opset24 import needs_opset_24

from fusion_edge.runtime import FusionError
from fusion_edge.runtime.backends.cuda import Cuda
from fusion_edge.runtime.backends.tensorrt.memory_estimate import RUNTIME_BYTES, check_device_memory, needed_bytes
from fusion_edge.runtime.bundle.engine_manifest import ENGINES_MANIFEST, EnginePlatform
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER, engines_folder, open_engines, read_engines
from fusion_edge.runtime.bundle.manifest import MANIFEST
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.errors import DeviceError

Manifest = dict[str, Any]
STAGE = {"stage": "prefill", "relative_error": 1e-3, "limit": 1e-2} | {
    "logits": {"kl_divergence": float("inf"), "kl_limit": 1e-4, "same_tokens": 1, "tokens": 1}
}


@pytest.fixture(scope="module")
def built(tiny_tensorrt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path_factory.mktemp("bundle") / "tiny"))
    assert build(open_bundle(folder), FakeTensorRT(*RTX, FakeCuda()), "--parts=1") == 0
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A bundle with engines to damage."""
    return Path(shutil.copytree(built, tmp_path / "tiny"))


def engines_in(folder: Path) -> Path:
    (engines,) = (path for path in (folder / ENGINES_FOLDER).iterdir() if path.is_dir())
    return engines


def refused(folder: Path, library: tuple[str, str] = RTX, **machine: Any) -> str:
    """Return the error of a backend that does not start: it passes nothing to TensorRT and frees the device."""
    trt = FakeTensorRT(*library, FakeCuda(**machine))
    with pytest.raises(FusionError) as refusal:
        open_backend(open_bundle(folder), trt)
    assert trt.loaded == 0
    trt.cuda.check_all_freed()
    return str(refusal.value)


# Damage ----------------------------------------------------------------------------------------------------------


def rewrite(change: Callable[[Manifest], object]) -> Callable[[Path], None]:
    """Return a damage to ``engines.json``."""

    def damage(engines: Path) -> None:
        manifest = json.loads((engines / ENGINES_MANIFEST).read_text(encoding="utf-8"))
        change(manifest)
        (engines / ENGINES_MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    return damage


def cut(engines: Path) -> None:
    content = (engines / "llm.engine").read_bytes()
    (engines / "llm.engine").write_bytes(content[:-1])


def alter(engines: Path) -> None:
    content = bytearray((engines / "llm.engine").read_bytes())
    content[len(content) // 2] ^= 1
    (engines / "llm.engine").write_bytes(content)


def first_profile(manifest: Manifest) -> Manifest:
    profile: Manifest = manifest["engines"]["llm"][0]["profiles"][0]
    return profile


def first_input(manifest: Manifest) -> Manifest:
    tensor: Manifest = manifest["engines"]["llm"][0]["inputs"][0]
    return tensor


def first_file(manifest: Manifest) -> Manifest:
    file: Manifest = manifest["engines"]["llm"][0]["file"]
    return file


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda engines: (engines / ENGINES_MANIFEST).write_text("{", encoding="utf-8"),
            "engines.json cannot be read (Expect",
        ),
        (
            lambda engines: (engines / ENGINES_MANIFEST).write_bytes(b"\xff"),
            "engines.json cannot be read ('utf-8' codec",
        ),
        (
            lambda engines: (engines / ENGINES_MANIFEST).write_text("[" * 99999, encoding="utf-8"),
            "engines.json cannot be read",
        ),
        (lambda engines: (engines / ENGINES_MANIFEST).unlink(), "engines.json cannot be read ([Errno 2]"),
        (rewrite(lambda manifest: manifest.update(schema_version=2)), "(schema_version is 2, not 1)"),
        (rewrite(lambda manifest: manifest.pop("max_context")), "max_context"),
        (rewrite(lambda manifest: manifest.update(max_context=0)), "(max_context is 0)"),
        (rewrite(lambda manifest: manifest["engines"].update(llm=[])), "(engines.llm is empty)"),
        (rewrite(lambda manifest: manifest["engines"]["llm"][0].update(profiles=[])), "[0].profiles is empty)"),
        (rewrite(lambda manifest: first_profile(manifest).update(positions=[1, 2])), "positions from [1, 2])"),
        (rewrite(lambda manifest: first_profile(manifest).update(positions=[1, 5, 2**62])), "positions from [1, 5, "),
        (rewrite(lambda manifest: first_profile(manifest).pop("positions")), "have different dimensions)"),
        (rewrite(lambda manifest: first_input(manifest).update(dtype="object")), "has the tensor {"),
        (rewrite(lambda manifest: first_input(manifest).update(shape=["nowhere"])), "has the tensor {"),
        (rewrite(lambda manifest: first_input(manifest).update(shape=["nowhere+4"])), "has the tensor {"),
        (rewrite(lambda manifest: first_input(manifest).update(shape=["positions+"])), "has the tensor {"),
        (rewrite(lambda manifest: first_input(manifest).update(shape=["positions+-4"])), "has the tensor {"),
        (rewrite(lambda manifest: first_input(manifest).update(shape=["positions+9999999999"])), "has the tensor {"),
        (rewrite(lambda manifest: first_input(manifest).pop("name")), "has the tensor {"),
        (rewrite(lambda manifest: first_file(manifest).update(size=-1)), "file.size is -1)"),
        (rewrite(lambda manifest: manifest["engines"].pop("llm")), "engines.json does not fit the bundle in llm;"),
        (
            rewrite(lambda manifest: manifest["check"].update(skipped=None)),
            "(check has neither stages nor a reason, or",
        ),
        (
            rewrite(lambda manifest: manifest["check"].update(stages=[STAGE])),
            "(check has neither stages nor a reason, or",
        ),
        (
            rewrite(lambda manifest: manifest["check"].update(skipped=None, stages=[STAGE])),
            "(check.stages[0] has figures that are not finite)",
        ),
        (
            rewrite(lambda manifest: manifest["check"].update(is_final=1)),
            "(check.is_final is 1, not a boolean)",
        ),
        (rewrite(lambda manifest: manifest["machine"].update(version="1.6")), "are for tensorrt_rtx 1.6 and compute"),
        (rewrite(lambda manifest: manifest["machine"].update(compute_capability="8.9")), "capability 8.9, not "),
        (rewrite(lambda manifest: manifest.update(bundle="0" * 64)), "belong to another bundle; build them:"),
        (rewrite(lambda manifest: first_file(manifest).update(path="../../llm.onnx")), "leads outside its folder"),
        (cut, "llm.engine has "),
        (alter, "llm.engine has been altered: its SHA-256 is not the one in engines.json. Build the engines again: "),
        (lambda engines: (engines / "llm.engine").unlink(), "llm.engine is missing though engines.json lists it."),
    ],
)
def test_damaged_engines(folder: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(engines_in(folder))
    message = refused(folder)
    assert reason in message
    if "outside" not in reason:
        assert message.rstrip(".").endswith(f"fusion-build {folder} --library tensorrt-rtx")


@pytest.mark.parametrize("damage", [cut, alter, rewrite(lambda manifest: manifest.update(schema_version=2))])
def test_fusion_build_repairs_damaged_engines(folder: Path, damage: Callable[[Path], object]) -> None:
    bundle, machine = open_bundle(folder), EnginePlatform(*RTX, "8.6")
    damage(engines_in(folder))
    with pytest.raises(FusionError):
        open_engines(bundle, machine)
    assert build(bundle, FakeTensorRT(*RTX, FakeCuda()), "--parts=1") == 0
    open_engines(bundle, machine)


# Engines of another bundle or GPU ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "capability", "wanted"),
    [
        (("tensorrt_rtx", "1.8.0"), "8.6", "tensorrt_rtx 1.8.0 and compute capability 8.6"),
        (RTX, "8.9", "tensorrt_rtx 1.7.1.116 and compute capability 8.9"),
        (FULL, "8.6", "tensorrt 10.16.0 and compute capability 8.6"),
    ],
)
def test_engines_of_another_machine(folder: Path, library: tuple[str, str], capability: str, wanted: str) -> None:
    name = library[0].replace("_", "-")
    assert refused(folder, library, compute_capability=capability) == (
        f"{folder} has no engines for {wanted} (only for tensorrt_rtx 1.7.1.116 and compute capability 8.6); build "
        f"them: fusion-build {folder} --library {name}"
    )


def test_engines_of_an_earlier_bundle(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps(manifest | {"source": "FUSION-other"}), encoding="utf-8")
    only = "(only for tensorrt_rtx 1.7.1.116 and compute capability 8.6, stale)"
    assert f"{only}; build them: fusion-build " in refused(folder)


def test_no_engines(folder: Path) -> None:
    shutil.rmtree(folder / ENGINES_FOLDER)
    message = f"{folder} has no engines for tensorrt_rtx 1.7.1.116 and compute capability 8.6; build them: fusion-build"
    assert refused(folder).startswith(message)


@needs_opset_24
def test_engines_with_other_tensors(folder: Path) -> None:
    """The manifest has the right checksum and other inputs."""
    trt = FakeTensorRT(*RTX, FakeCuda())
    rewrite(lambda manifest: manifest["engines"]["alignment_decoder"][0]["inputs"].pop())(engines_in(folder))
    with pytest.raises(FusionError, match=r"alignment_decoder.engine has inputs and outputs that its manifest"):
        open_backend(open_bundle(folder), trt)
    trt.cuda.check_all_freed()


# Memory of the device --------------------------------------------------------------------------------------------


def built_engines(folder: Path) -> tuple[Bundle, Any]:
    bundle = open_bundle(folder)
    return bundle, read_engines(engines_folder(bundle, EnginePlatform(*RTX, "8.6")))


@needs_opset_24
def test_just_enough_memory(folder: Path) -> None:
    bundle, engines = built_engines(folder)
    free = needed_bytes(bundle.manifest, engines, engines.max_context)
    check_device_memory(bundle.manifest, engines, Cuda(FakeCuda(free=free)))
    trt = FakeTensorRT(*RTX, FakeCuda(free=free))
    backend = open_backend(bundle, trt)
    assert trt.cuda.used + engines.size <= free - RUNTIME_BYTES
    backend.close()
    trt.cuda.check_all_freed()


@pytest.mark.parametrize("missing", [1, 10_000, 300_000])
def test_the_suggested_context_fits(folder: Path, missing: int) -> None:
    """Engines rebuilt with the context of the error start."""
    bundle, engines = built_engines(folder)
    free = needed_bytes(bundle.manifest, engines, engines.max_context) - missing
    with pytest.raises(DeviceError, match=r"or build with fusion-build --max-context \d+, which fits") as refusal:
        check_device_memory(bundle.manifest, engines, Cuda(FakeCuda(free=free)))
    option, positions = str(refusal.value).removesuffix(", which fits.").split()[-2:]
    assert 0 < int(positions) < engines.max_context
    assert build(bundle, FakeTensorRT(*RTX, FakeCuda()), "--parts=1", option, positions) == 0
    _, rebuilt = built_engines(folder)
    assert rebuilt.max_context == int(positions)
    check_device_memory(bundle.manifest, rebuilt, Cuda(FakeCuda(free=free)))


def test_no_context_fits(folder: Path) -> None:
    message = refused(folder, free=1_000_000)
    assert message.startswith("The engines need about 0.35 GB on the device (0.00 GB of weights, 0.00 GB of KV cache ")
    assert message.endswith(
        "0.00 of 0.00 GB are free. Close other programs, or export with --int4, --kv-cache int8, fewer --image-tokens "
        "or a smaller --query-len (no --max-context fits)."
    )
