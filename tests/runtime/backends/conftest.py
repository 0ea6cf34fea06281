"""A bundle for TensorRT, and a backend that runs it on the fakes of TensorRT and CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.fake_tensorrt import RTX
from fakes.on_fake_tensorrt import OnFake, open_on_fake
from support.backend_contract import HALF, Subject

from fusion_edge.export import cli
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    assert cli.main([str(tiny_checkpoint), "-o", str(folder), "--fp16", "--target", "tensorrt"]) == 0
    return open_bundle(folder)


@pytest.fixture
def on_fake(bundle: Bundle) -> Iterator[OnFake]:
    """An open backend; afterwards all memory is free."""
    fake = open_on_fake(bundle, *RTX, "--parts=1")
    yield fake
    fake.backend.close()
    fake.cuda.check_all_freed()
    assert fake.trt.released_early == []


@pytest.fixture
def subject(on_fake: OnFake, bundle: Bundle) -> Subject:
    return Subject(on_fake.backend, bundle.manifest, HALF)
