"""The kernel cache of TensorRT-RTX, on fakes of TensorRT and CUDA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_cuda import FakeCuda, Misuse
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.on_fake_tensorrt import build, open_backend, open_on_fake
from support.opset24 import needs_opset_24

from fusion_edge.runtime.backends.tensorrt.kernel_cache import KernelCache
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle

pytestmark = needs_opset_24  # the fake of TensorRT computes with it


@pytest.fixture(scope="module")
def bundle(tiny_tensorrt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    return open_bundle(shutil.copytree(tiny_tensorrt_bundle, folder))


def test_compiled_kernels_are_saved(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = open_on_fake(bundle, *RTX, "--parts=1")
    (file,) = (tmp_path / "fusion-edge").iterdir()
    assert file.name.startswith("tensorrt_rtx-")
    assert fake.trt.kernels is not None
    fake.trt.kernels.content = b"kernels of a prompt"
    fake.backend.close()
    assert file.read_bytes() == b"kernels of a prompt"
    again = open_backend(bundle, fake.trt)
    assert fake.trt.kernels.content == b"kernels of a prompt"
    again.close()
    file.write_bytes(b"damaged")
    open_backend(bundle, fake.trt).close()
    assert fake.trt.kernels.was_given == b"damaged"
    assert file.read_bytes() == b"kernels"


def test_an_unwritable_cache_folder_is_a_warning(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fusion-edge").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = open_on_fake(bundle, *RTX, "--parts=1")
    fake.backend.close()
    assert capsys.readouterr().err.count("warning: cannot save compiled kernels in") == 1


def test_the_fake_detects_a_configuration_that_is_freed_too_early(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = FakeTensorRT(*RTX, FakeCuda())
    assert build(bundle, trt, "--parts=1") == 0
    configure = KernelCache.configure

    def configure_and_free(self: KernelCache, *arguments: Any) -> Any:
        configuration = configure(self, *arguments)
        self._configurations.clear()
        return configuration

    monkeypatch.setattr(KernelCache, "configure", configure_and_free)
    with pytest.raises(Misuse, match="configuration has been released"):
        open_backend(bundle, trt)
    assert "IRuntimeConfig before IExecutionContext" in trt.released_early
