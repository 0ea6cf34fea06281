"""``fusion-build`` on a Jetson, and for another one, with fakes of TensorRT and of the machine."""

from __future__ import annotations

import re
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import JETPACK_6, RTX, FakeTensorRT
from fakes.on_fake_tensorrt import build, open_backend
from hypothesis import given
from hypothesis import strategies as st
from support.opset24 import needs_opset_24

from fusion_edge.export.engines import builder as engine_builder
from fusion_edge.export.engines import cli as cli_build
from fusion_edge.export.engines import engine_folder, jetsons
from fusion_edge.export.engines.jetsons import (
    BLOCKS_OF_A_WEIGHT,
    LIMITS,
    check_contiguous_memory,
    out_of_memory_remedy,
)
from fusion_edge.runtime.backends.tensorrt import backend
from fusion_edge.runtime.bundle.engine_manifest import EnginePlatform, Engines
from fusion_edge.runtime.bundle.engines import engines_folder, read_engines
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.cli.options import byte_count
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.system.jetson import ContiguousMemory, Jetson

NANO = Jetson("NVIDIA Jetson Orin Nano Developer Kit", 7_650_000_000)
AGX = Jetson("NVIDIA Jetson AGX Orin Developer Kit", 64_000_000_000)
DEFAULT_CMA = ContiguousMemory(4_194_304, 900, 250_000_000, 268_435_456)


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny")))


def put_on(monkeypatch: pytest.MonkeyPatch, here: Jetson | None, memory: ContiguousMemory = DEFAULT_CMA) -> None:
    """Let this machine be a Jetson with free ``memory``."""
    for module in (cli_build, engine_folder, engine_builder, backend):
        monkeypatch.setattr(module, "this_jetson", lambda: here)
    monkeypatch.setattr(engine_folder, "contiguous_memory", lambda: memory)


def jetpack_6(compute_capability: str = "8.7") -> FakeTensorRT:
    return FakeTensorRT(*JETPACK_6, FakeCuda(compute_capability=compute_capability))


def engines(bundle: Bundle) -> Engines:
    return read_engines(engines_folder(bundle, EnginePlatform(*JETPACK_6, "8.7")))


# Contiguous memory -----------------------------------------------------------------------------------------------


def test_a_build_on_an_orin_nano(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on(monkeypatch, NANO)
    assert build(bundle, jetpack_6()) == 0
    printed = "largest block for weights: 1.81 MB; memory: 900 free blocks of 4.2 MB; CMA has 250 of 268 MB free\n"
    assert printed in capsys.readouterr().err
    built = engines(bundle)
    assert (built.max_block, built.workspace, built.timed_on) == (400_000_000, 512_000_000, NANO.model)


def test_options_replace_the_defaults_of_a_jetson(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on(monkeypatch, NANO)
    assert build(bundle, jetpack_6(), "--max-block=300MB", "--workspace=1GB") == 0
    built = engines(bundle)
    assert (built.max_block, built.workspace) == (300_000_000, 1_000_000_000)


def test_too_little_contiguous_memory(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on(monkeypatch, NANO, ContiguousMemory(1_048_576, 3, 900_000, 268_435_456))
    trt = jetpack_6()
    assert build(bundle, trt) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "error: The weights of an engine need up to 1.81 MB in one block, and at most 1.05 MB are "
    )
    assert not trt.built
    assert build(bundle, trt, "--skip-memory-check") == 0
    assert len(trt.built) > 2


def test_a_large_jetson_has_no_limits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its contiguous memory is printed."""
    put_on(monkeypatch, AGX, ContiguousMemory(1_048_576, 3, 0, 0))
    assert build(bundle, jetpack_6()) == 0
    assert "memory: 3 free blocks of 1.0 MB; CMA has 0 of 0 MB free\n" in capsys.readouterr().err
    built = engines(bundle)
    assert (built.max_block, built.workspace, built.timed_on) == (None, None, AGX.model)


def test_another_machine_has_no_limits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on(monkeypatch, None)
    assert build(bundle, jetpack_6()) == 0
    assert "CMA" not in capsys.readouterr().err
    built = engines(bundle)
    assert (built.max_block, built.workspace, built.timed_on) == (None, None, None)


def test_a_warning_between_once_and_twice(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on(monkeypatch, NANO, ContiguousMemory(1_048_576, 3, 3_000_000, 268_435_456))
    trt = jetpack_6()
    assert build(bundle, trt) == 0
    assert len(trt.built) > 2
    assert (
        "warning: The weights of an engine need up to 1.81 MB in one block. A build may take 2 times that, and at most "
        "3.00 MB are free: it may fail. Add cma=950M to APPEND in /boot/extlinux/extlinux.conf and reboot. Build "
        "before anything else; or give a smaller --max-block.\n"
    ) in capsys.readouterr().err
    assert build(bundle, jetpack_6(), "--force", "--skip-memory-check") == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        (125_000_000, ""),
        (125_000_001, "250.00 MB are free: it may fail. "),
        (250_000_000, "(such as 120MB).\n"),
    ],
)
def test_limits_of_the_warning(largest: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_contiguous_memory(largest, DEFAULT_CMA)
    written = capsys.readouterr().err
    assert said in written
    assert bool(said) == bool(written)


def test_the_published_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """A weight of 622 MB with 779 MB free failed; halves of it built with 932 MB free. The default limit does, too."""
    check_contiguous_memory(622_329_856, ContiguousMemory(0, 0, 779_000_000, 1_006_632_960))
    assert "it may fail" in capsys.readouterr().err
    for largest in (622_329_856 // 2, LIMITS["orin-nano"].max_block):
        assert largest is not None
        check_contiguous_memory(largest, ContiguousMemory(0, 0, 932_000_000, 1_006_632_960))
    assert capsys.readouterr().err == ""


def test_the_refusal_names_the_remedies() -> None:
    with pytest.raises(FusionError) as refusal:
        check_contiguous_memory(394_000_000, DEFAULT_CMA)
    assert str(refusal.value) == (
        "The weights of an engine need up to 394.00 MB in one block, and at most 250.00 MB are free (900 free blocks "
        "of 4.2 MB; CMA has 250 of 268 MB free). Add cma=950M to APPEND in /boot/extlinux/extlinux.conf and reboot. "
        "Build before anything else; or give a smaller --max-block (such as 120MB). --skip-memory-check builds "
        "nevertheless."
    )
    with pytest.raises(FusionError) as refusal:
        check_contiguous_memory(394_000_000, ContiguousMemory(0, 0, 300_000_000, 1_006_632_960))
    assert "cma=" not in str(refusal.value)  # it has been enlarged


@given(st.integers(20_000_000, 10**10), st.integers(0, 1 << 22), st.integers(1, 10**10))
def test_the_suggested_block_fits(cma_free: int, block: int, excess: int) -> None:
    """Without a warning."""
    memory = ContiguousMemory(block, 1, cma_free, cma_free)
    with pytest.raises(FusionError) as refusal:
        check_contiguous_memory(memory.largest + excess, memory)
    suggested = re.search(r"--max-block \(such as (\w+)\)", str(refusal.value))
    assert suggested is not None
    with redirect_stderr(StringIO()) as written:
        check_contiguous_memory(byte_count(suggested[1]), memory)
    assert written.getvalue() == ""
    assert BLOCKS_OF_A_WEIGHT * byte_count(suggested[1]) > memory.largest - 20_000_000  # and is not needlessly small


def test_no_block_that_fits() -> None:
    with pytest.raises(FusionError, match=r"give a smaller --max-block\. --skip-memory-check"):
        check_contiguous_memory(5_000_000, ContiguousMemory(4_194_304, 1, 0, 0))


def test_remedies_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetsons, "contiguous_memory", lambda: DEFAULT_CMA)
    elsewhere = "build with more --parts, or a smaller --max-block, --max-context or --workspace."
    assert out_of_memory_remedy(True, None, None) == f"Memory ran out; {elsewhere}"
    assert out_of_memory_remedy(False, None, None) == f"If memory ran out, {elsewhere}"
    assert out_of_memory_remedy(True, AGX, None) == f"Memory ran out; {elsewhere}"
    assert out_of_memory_remedy(True, NANO, None) == (
        "Memory ran out, perhaps in one block only. Add cma=950M to APPEND in /boot/extlinux/extlinux.conf and reboot. "
        "Build with --max-block 400MB, more --parts or a smaller --max-context."
    )
    uncertain = out_of_memory_remedy(False, NANO, 400_000_000)
    assert uncertain.startswith("If NvMap has printed errors, memory ran out, perhaps in one block only. Add cma=950M ")
    assert ". Build with a --max-block below 400.00 MB, more --parts or " in uncertain


# Engines of another Jetson -----------------------------------------------------------------------------------------


@needs_opset_24
def test_engines_built_on_an_agx_orin(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have the limits of the Orin Nano, and run there after a copy, with a note."""
    put_on(monkeypatch, AGX)
    trt = jetpack_6()
    assert build(bundle, trt, "--for=orin-nano") == 0
    note = (
        "note: kernels are timed on this NVIDIA Jetson AGX Orin Developer Kit; they run on the orin-nano, where others"
    )
    assert note in capsys.readouterr().err
    built = engines(bundle)
    assert (built.max_block, built.workspace, built.timed_on) == (400_000_000, 512_000_000, AGX.model)

    copy = open_bundle(Path(shutil.copytree(bundle.folder, tmp_path / "copy")))
    put_on(monkeypatch, NANO)
    open_backend(copy, trt).close()
    assert capsys.readouterr().err == (
        "note: kernels were timed on NVIDIA Jetson AGX Orin Developer Kit, not on this NVIDIA Jetson Orin Nano "
        "Developer Kit; fusion-build --force times them here\n"
    )
    trt.built.clear()
    assert build(copy, trt) == 0
    assert not trt.built  # up to date


@needs_opset_24
@pytest.mark.parametrize("here", [NANO, None])
def test_engines_built_where_they_run(
    bundle: Bundle, here: Jetson | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on(monkeypatch, here)
    trt = jetpack_6()
    assert build(bundle, trt) == 0
    capsys.readouterr()
    open_backend(bundle, trt).close()
    assert capsys.readouterr().err == ""


def test_for_an_orin_nano_on_itself(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on(monkeypatch, NANO)
    assert build(bundle, jetpack_6(), "--for=orin-nano") == 0
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("here", [Jetson("NVIDIA Jetson AGX Thor Developer Kit", 128_000_000_000), None])
def test_for_an_orin_nano_on_another_gpu(
    bundle: Bundle, here: Jetson | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_on(monkeypatch, here)
    trt = jetpack_6("11.0")
    assert build(bundle, trt, "--for=orin-nano") == 2
    assert capsys.readouterr().err == (
        "error: --for orin-nano needs compute capability 8.7, and this build is for 11.0; run it on a Jetson Orin with "
        "the TensorRT of that device.\n"
    )
    assert not trt.built


def test_kernels_of_tensorrt_rtx_are_timed_where_they_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on(monkeypatch, AGX)
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt) == 0
    assert read_engines(engines_folder(bundle, EnginePlatform(*RTX, "8.6"))).timed_on is None
