"""The choice of a device for a bundle, and the reasons against better ones."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from support.cpu_kernel_switches import needs_cpu_kernels
from support.opset24 import needs_opset_24

from fusion_edge.export import cli as export_cli
from fusion_edge.runtime import FusionError, load
from fusion_edge.runtime.backends import devices
from fusion_edge.runtime.backends.onnxruntime import cpu_kernels
from fusion_edge.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from fusion_edge.runtime.backends.tensorrt.library import INSTALL, LIBRARIES
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.cli import run as cli_run
from fusion_edge.runtime.errors import DeviceError

NO_DRIVER = "No NVIDIA driver (libcuda.so.1) is installed; install it if the machine has an NVIDIA GPU."
NO_PROVIDER = (
    "The installed onnxruntime has no CUDA provider; "
    "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install '.[cuda]' in a clone of fusion-edge."
)
NO_TENSORRT = {name: f"{name} is not installed; {remedy}." for name, remedy in INSTALL.items()}
Refuse = Callable[..., str]


def other_target(target: str, wanted: str) -> str:
    command = f"fusion-export FUSION-tiny -o FOLDER --target {wanted}"
    return f"The bundle was exported for {target}; {command} exports one for this device."


NOT_FOR_TENSORRT = dict.fromkeys(LIBRARIES, other_target("cuda", "tensorrt"))
"""Of a bundle for CUDA."""


@pytest.fixture(scope="module")
def tensorrt_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tensorrt"
    options = ["--fp16", "--target", "tensorrt", "--query-len", "4"]
    assert export_cli.main([str(tiny_checkpoint), "-o", str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def cuda_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "cuda"
    options = ["--fp16", "--target", "cuda", "--query-len", "4"]  # ONNX Runtime 1.23 computes NaN with INT4 on a CPU
    assert export_cli.main([str(tiny_checkpoint), "-o", str(folder), *options]) == 0
    return folder


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``machine(gpus=..., providers=..., wheels=..., libraries=...)`` fakes a machine, by default without a driver."""

    def have(
        gpus: int | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        wheels: tuple[str, ...] = ("onnxruntime",),
        libraries: tuple[str, ...] = (),
    ) -> None:
        cdll = ctypes.CDLL

        def driver(name: str) -> Any:
            if name is None or "libcuda" not in name:
                return cdll(name)
            if gpus is None:
                raise OSError("libcuda.so.1: cannot open shared object file")

            def count(pointer: Any) -> int:
                pointer._obj.value = gpus
                return 0

            return SimpleNamespace(cuInit=lambda _: 0, cuDeviceGetCount=count)

        for name in LIBRARIES:
            module = ModuleType(name.replace("-", "_")) if name in libraries else None
            monkeypatch.setitem(sys.modules, name.replace("-", "_"), module)
        monkeypatch.setattr(ctypes, "CDLL", driver)
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: list(providers))
        monkeypatch.setattr(devices, "is_installed", lambda name: name in wheels)

    return have


@pytest.fixture
def cuda_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the device ``cuda`` as the same backend on the CPU."""

    def open_backend(bundle: Bundle, threads: int | None, spin: bool) -> OnnxRuntimeBackend:
        return OnnxRuntimeBackend(bundle, "cpu", threads, spin)

    replace_cuda(monkeypatch, open_backend)


def replace_cuda(monkeypatch: pytest.MonkeyPatch, open_backend: Any) -> None:
    replaced = [
        dataclasses.replace(one, open=open_backend) if one.name == "cuda" else one for one in devices.CANDIDATES
    ]
    monkeypatch.setattr(devices, "CANDIDATES", replaced)


WHOLE: dict[str, Any] = {"gpus": 1, "providers": ("CUDAExecutionProvider", "CPUExecutionProvider")}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({}, NO_DRIVER),
        ({"gpus": 0}, "The NVIDIA driver finds no working GPU; check nvidia-smi."),
        ({"gpus": 1}, NO_PROVIDER),
        (
            {"gpus": 1, "wheels": ("onnxruntime", "onnxruntime-gpu")},
            "The installed onnxruntime hides onnxruntime-gpu, whose files it has overwritten; "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install '.[cuda]' in a clone of fusion-edge.",
        ),
    ],
)
def test_reasons_name_what_the_machine_lacks(
    cuda_bundle: Path, machine: Callable[..., None], found: dict[str, Any], reason: str
) -> None:
    machine(**found)
    with load(cuda_bundle, threads=1) as fusion:
        assert (fusion.device.name, fusion.device.not_taken) == ("cpu", NOT_FOR_TENSORRT | {"cuda": reason})
    with pytest.raises(FusionError) as refusal:
        load(cuda_bundle, device="cuda")
    assert str(refusal.value) == f"Cannot run {cuda_bundle} on cuda: {reason}"


def test_a_bundle_for_another_target(tiny_bundle: Path, machine: Callable[..., None]) -> None:
    """The reason is the target, whatever else is missing: installing something would not help."""
    reasons = {name: other_target("cpu", name.removesuffix("-rtx")) for name in (*LIBRARIES, "cuda")}
    for found in (WHOLE, {}):
        machine(**found)
        with load(tiny_bundle, threads=1) as fusion:
            assert (fusion.device.name, fusion.device.not_taken) == ("cpu", reasons)
    with pytest.raises(FusionError, match=r"on cuda: The bundle was exported for cpu; .* --target cuda exports one"):
        load(tiny_bundle, device="cuda")


@pytest.mark.usefixtures("cuda_backend")
def test_auto_chooses_the_best_device(cuda_bundle: Path, machine: Callable[..., None]) -> None:
    machine(**WHOLE)
    for device in ("auto", "cuda"):
        with load(cuda_bundle, device=device, threads=1) as fusion:
            not_taken = NOT_FOR_TENSORRT if device == "auto" else {}
            assert (fusion.device.name, fusion.device.not_taken) == ("cuda", not_taken)
    with load(cuda_bundle, device="cpu", threads=1) as fusion:
        assert (fusion.device.name, fusion.device.not_taken) == ("cpu", {})  # no other device was tried


def test_auto_skips_a_device_that_does_not_start(
    cuda_bundle: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: Bundle, threads: int | None, spin: bool) -> OnnxRuntimeBackend:
        raise DeviceError("It needs libcudnn.so.9; install it.")

    machine(**WHOLE)
    replace_cuda(monkeypatch, fail)
    with load(cuda_bundle, threads=1) as fusion:
        reasons = NOT_FOR_TENSORRT | {"cuda": "It needs libcudnn.so.9; install it."}
        assert (fusion.device.name, fusion.device.not_taken) == ("cpu", reasons)
    with pytest.raises(FusionError, match=r"on cuda: It needs libcudnn.so.9; install it."):
        load(cuda_bundle, device="cuda")


def test_a_damaged_bundle_does_not_select_another_device(
    cuda_bundle: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: Bundle, threads: int | None, spin: bool) -> OnnxRuntimeBackend:
        raise FusionError("It cannot be loaded.")

    machine(**WHOLE)
    replace_cuda(monkeypatch, fail)
    with pytest.raises(FusionError, match=r"^It cannot be loaded.$"):
        load(cuda_bundle)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "ONNX Runtime is not installed; run pip install '.[{}]' in a clone of fusion-edge."),
        (
            ModuleType("onnxruntime"),  # the rest after removing one of two wheels
            "ONNX Runtime cannot be imported (cannot import name 'InferenceSession' from 'onnxruntime' (unknown "
            "location)); pip uninstall -y onnxruntime onnxruntime-gpu, "
            "then pip install '.[{}]' in a clone of fusion-edge.",
        ),
    ],
)
def test_without_onnxruntime(
    cuda_bundle: Path,
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType | None,
    reason: str,
) -> None:
    machine(gpus=1)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(FusionError) as refusal:
        load(cuda_bundle)
    standard_error = " ".join(f"{name}: {why}" for name, why in NOT_FOR_TENSORRT.items())
    standard_error += f" cuda: {reason.format('cuda')} cpu: {reason.format('cpu')}"
    assert str(refusal.value) == f"No device of this machine can run {cuda_bundle}. {standard_error}"


# fusion-run -------------------------------------------------------------------------------------------------


@pytest.fixture
def standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``standard_error(bundle, *options)`` returns standard error of a question, without notes about CPU kernels."""
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")

    def run(bundle: Path, *options: str) -> str:
        capsys.readouterr()
        arguments = [str(bundle), "--image", str(tmp_path / "image.png"), "--ask=What?", "--threads=1"]
        assert cli_run.main([*arguments, "--max-new-tokens=1", *options]) == 0
        output = capsys.readouterr()
        assert output.out.count("\n") == 1
        return "".join(
            line for line in output.err.splitlines(keepends=True) if not line.startswith(("note: ", "CPU kernels: "))
        )

    return run


def lines(bundle: Path, not_taken: Mapping[str, str], taken: str) -> str:
    """Return the output of ``--verbose``."""
    reasons = "".join(f"not on {name}: {reason}\n" for name, reason in not_taken.items())
    return f"bundle: local folder {bundle}\n{reasons}running on {taken}\n"


def test_a_gpu_bundle_on_the_cpu_is_a_warning(
    cuda_bundle: Path, machine: Callable[..., None], standard_error: Callable[..., str]
) -> None:
    machine()
    assert standard_error(cuda_bundle) == f"warning: running on cpu, not on cuda: {NO_DRIVER}\n"
    assert standard_error(cuda_bundle, "--device=cpu") == ""
    assert standard_error(cuda_bundle, "--verbose") == lines(cuda_bundle, NOT_FOR_TENSORRT | {"cuda": NO_DRIVER}, "cpu")


@needs_opset_24
@pytest.mark.parametrize("installed", [(), ("tensorrt-rtx",)])
def test_a_tensorrt_bundle_on_the_cpu_is_a_warning(
    tensorrt_bundle: Path, machine: Callable[..., None], standard_error: Callable[..., str], installed: tuple[str, ...]
) -> None:
    """The warning names both libraries that could run it."""
    machine(libraries=installed)
    reasons = NO_TENSORRT | dict.fromkeys(installed, NO_DRIVER)
    line = " ".join(f"not on {name}: {reason}" for name, reason in reasons.items())
    assert standard_error(tensorrt_bundle) == f"warning: running on cpu, {line}\n"
    assert standard_error(tensorrt_bundle, "--verbose") == lines(
        tensorrt_bundle, reasons | {"cuda": other_target("tensorrt", "cuda")}, "cpu"
    )


def test_a_cpu_bundle_on_the_cpu_is_no_warning(
    tiny_bundle: Path, machine: Callable[..., None], standard_error: Callable[..., str]
) -> None:
    machine()
    assert standard_error(tiny_bundle) == ""
    assert standard_error(tiny_bundle, "--device=cpu", "--verbose") == lines(tiny_bundle, {}, "cpu")


@pytest.mark.usefixtures("cuda_backend")
def test_a_gpu_bundle_on_the_gpu_is_no_warning(
    cuda_bundle: Path, machine: Callable[..., None], standard_error: Callable[..., str]
) -> None:
    machine(**WHOLE)
    assert standard_error(cuda_bundle) == ""
    assert standard_error(cuda_bundle, "--verbose") == lines(cuda_bundle, NOT_FOR_TENSORRT, "cuda")


def test_a_named_device_that_is_missing_is_an_error(
    cuda_bundle: Path, machine: Callable[..., None], refused: Refuse
) -> None:
    machine()
    message = refused(cli_run.main, cuda_bundle, "--image=x.png", "--ask=What?", "--device=cuda")
    assert message == f"error: Cannot run {cuda_bundle} on cuda: {NO_DRIVER}\n"


def test_a_reason_is_a_sentence_with_a_remedy(cuda_bundle: Path) -> None:
    """On this machine, with whatever devices it has."""
    bundle = open_bundle(cuda_bundle)
    for candidate in devices.CANDIDATES:
        reason = candidate.reason(bundle)
        assert reason is None or (reason.endswith(".") and ";" in reason)


# CPU kernels --------------------------------------------------------------------------------------------------

NOT_COMPILED = (
    "They are not compiled: with AVX-512, prefill takes two to three times as long, and a decode step 1.5 times. "
    "Install GCC 11 or newer (Debian: apt install g++), then fusion-edge again."
)
NEEDED = "They need a processor with AVX2 (x86_64) or NEON dot product (aarch64)."


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this an installation without a compiler, in a process that has not warned yet."""
    monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    devices._warn_of_missing_kernels.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "library", "tier", "reason"),
    [
        ("x86_64", None, None, NOT_COMPILED),
        ("riscv64", None, None, NEEDED),
        ("x86_64", Path("library.so"), None, NEEDED),
        ("x86_64", Path("library.so"), "AMX", None),
    ],
)
def test_reasons_against_the_cpu_kernels(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    library: Path | None,
    tier: str | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(cpu_kernels, "library", lambda: library)
    monkeypatch.setattr(cpu_kernels, "tier", lambda: tier)
    manifest = open_bundle(tiny_bundle).manifest
    assert cpu_kernels.unsupported_reason(manifest) == reason
    level = "They compute at accuracy level 4, and the bundle has 0."
    assert cpu_kernels.unsupported_reason(dataclasses.replace(manifest, accuracy_level=0)) == level
    assert "exported for cuda" in str(cpu_kernels.unsupported_reason(dataclasses.replace(manifest, target="cuda")))


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("options", [[], ["--verbose"]])
def test_fusion_run_says_once_what_missing_kernels_cost(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert cli_run.main([str(tiny_bundle), "--image=absent.png", "--ask=What?", "--threads=1", *options]) == 1
    printed = capsys.readouterr().err
    note = f"note: MatMul and attention run on ONNX Runtime's kernels instead of faster ones. {NOT_COMPILED}\n"
    assert printed.count(note) == printed.count("not compiled") == 1


@pytest.mark.usefixtures("not_compiled")
def test_load_warns_once_of_missing_kernels(tiny_bundle: Path) -> None:
    expected = f"fusion-edge runs without its CPU kernels. {NOT_COMPILED}"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            with load(tiny_bundle, threads=1) as fusion:
                assert fusion.device.kernels is None
    assert [(str(one.message), one.category, one.filename) for one in warned] == [(expected, RuntimeWarning, __file__)]


@needs_cpu_kernels
def test_the_tier_in_use_is_named(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = cpu_kernels.tiers()[-1]
    options = ["--image=absent.png", "--ask=What?", "--threads=1"]
    assert cli_run.main([str(tiny_bundle), *options, "--verbose"]) == 1
    assert f"running on cpu\nCPU kernels: {tier}\n" in capsys.readouterr().err
    assert cli_run.main([str(tiny_bundle), *options]) == 1
    assert "CPU kernels" not in capsys.readouterr().err
    assert cli_info.main([str(tiny_bundle)]) == 0
    assert re.search(rf"^CPU kernels +{tier}, on this machine$", capsys.readouterr().out, re.MULTILINE)


def test_fusion_info_tells_why_a_bundle_runs_without_the_kernels(
    cuda_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_info.main([str(cuda_bundle)]) == 0
    reason = "They compute in float32, and the bundle was exported for cuda."
    assert re.search(rf"^CPU kernels +not used\. {reason}$", capsys.readouterr().out, re.MULTILINE)
