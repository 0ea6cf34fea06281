"""``fusion-build`` compares engines that exist already: alone in their folder, which does not keep wrong ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_tensorrt import RTX
from support.compared_engines import build, changed, engines_of, fake, folders, half
from support.opset24 import needs_opset_24

from fusion_edge.export.bundle.folder_lock import locked_folder
from fusion_edge.export.engines.engine_folder import compare_existing
from fusion_edge.export.engines.stage_outputs import StageRunner
from fusion_edge.runtime.backends.tensorrt.library import Library
from fusion_edge.runtime.bundle.engine_manifest import ENGINES_MANIFEST, EnginePlatform
from fusion_edge.runtime.bundle.engines import ENGINES_FOLDER, open_engines
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.errors import DeviceError, FusionError

pytestmark = needs_opset_24
PLATFORM = EnginePlatform(*RTX, "8.6")


@pytest.fixture
def bundle(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with engines that were not compared."""
    folder = Path(shutil.copytree(tiny_tensorrt_bundle, tmp_path / "tiny"))
    assert build(fake(), folder, "--skip-comparison") == 0
    return folder


def test_wrong_engines_are_deleted(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So nothing loads them."""
    changed(monkeypatch, "features", half)
    assert build(fake(), bundle) == 1
    message = capsys.readouterr().err
    assert " are wrong in encode global crops: " in message
    assert message.endswith(" --skip-comparison builds nevertheless. The engines are deleted.\n")
    assert folders(bundle) == []
    with pytest.raises(DeviceError, match="has no engines for"):
        open_engines(open_bundle(bundle), PLATFORM)


def test_foreign_files_beside_wrong_engines_stay(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = folders(bundle)
    (folder / "notes.txt").write_text("mine")
    changed(monkeypatch, "features", half)
    assert build(fake(), bundle) == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / ENGINES_MANIFEST).exists()
    with pytest.raises(FusionError, match="cannot be read"):
        open_engines(open_bundle(bundle), PLATFORM)


def test_engines_that_do_not_run_stay(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The device may be the reason."""
    before, trt = engines_of(bundle), fake()
    trt.run_error = "an illegal memory access was encountered"
    assert build(trt, bundle) == 1
    assert "illegal memory access" in capsys.readouterr().err
    assert engines_of(bundle) == before


def test_another_build_is_waited_for(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = folders(bundle)
    before = engines_of(bundle)
    with locked_folder(folder.parent / f".{folder.name}.partial", ""):
        assert build(fake(), bundle) == 1
    assert f"Another build is writing {folder}; wait for it" in capsys.readouterr().err
    (folder.parent / f".{folder.name}.partial").rmdir()
    assert engines_of(bundle) == before


def test_no_other_build_during_a_comparison(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, codes = StageRunner.run, []

    def run_beside_a_build(self: Any, backend: Any, given: Any = None) -> Any:
        if given is None:
            codes.append(build(fake(), bundle, "--skip-comparison", "--force"))
        return run(self, backend, given)

    monkeypatch.setattr(StageRunner, "run", run_beside_a_build)
    assert build(fake(), bundle) == 0
    assert codes == [1]
    assert "Another build is writing " in capsys.readouterr().err
    assert engines_of(bundle).check.skipped is None
    assert len(list((bundle / ENGINES_FOLDER).iterdir())) == 1  # no lock is left


def test_engines_that_another_build_has_changed(bundle: Path) -> None:
    """They were read before the lock."""
    opened, trt = open_bundle(bundle), fake()
    _, read = open_engines(opened, PLATFORM)
    assert build(fake(), bundle, "--skip-comparison", "--force", "--workspace=1MB") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusion_edge.export.engines.engine_folder.skipped_reason", lambda *_: None)
        with pytest.raises(FusionError, match=r"^Another fusion-build has changed .* meanwhile; run the command again"):
            compare_existing(opened, Library(trt), read, is_wanted=True)
    assert engines_of(bundle).workspace == 1_000_000
