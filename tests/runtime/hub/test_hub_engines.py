"""Engines of a bundle in the hub's cache lie in the user's cache folder, and never come from the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fakes.fake_cuda import FakeCuda
from fakes.fake_tensorrt import RTX, FakeTensorRT
from fakes.on_fake_tensorrt import installed
from support.hub_cache import in_hub_cache

from fusion_edge.export.engines import cli as cli_build
from fusion_edge.runtime.bundle.engine_manifest import EnginePlatform
from fusion_edge.runtime.bundle.engines import all_engines, engines_folder, open_engines
from fusion_edge.runtime.bundle.files import is_snapshot
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.errors import DeviceError

MACHINE = EnginePlatform(*RTX, "8.6")


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "fusion-edge" / "engines"


@pytest.fixture
def snapshot(tiny_tensorrt_bundle: Path, tmp_path: Path) -> Path:
    return in_hub_cache(tiny_tensorrt_bundle, tmp_path / "models--org--name")


def build(folder: Path) -> int:
    """Build without a comparison: the fake of TensorRT reads no weights through the links of a snapshot."""
    with installed(FakeTensorRT(*RTX, FakeCuda())):
        return cli_build.main([str(folder), "--library=tensorrt-rtx", "--parts=1", "--skip-comparison"])


def test_engines_are_built_outside_the_hub_cache(
    snapshot: Path, user_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(snapshot.parent.parent.rglob("*"))
    assert build(snapshot) == 0
    assert sorted(snapshot.parent.parent.rglob("*")) == before
    bundle = open_bundle(snapshot)
    folder, engines = open_engines(bundle, MACHINE)
    assert folder.parent == user_cache
    capsys.readouterr()
    assert build(snapshot) == 0
    assert "up to date" in capsys.readouterr().out
    assert cli_info.main([str(snapshot)]) == 0
    assert f"{engines.machine}, {engines.max_context} tokens" in capsys.readouterr().out


def test_bundles_share_the_folder_of_engines_but_no_engine(
    snapshot: Path, tiny_bundle: Path, tmp_path: Path, user_cache: Path
) -> None:
    assert build(snapshot) == 0
    other = open_bundle(in_hub_cache(tiny_bundle, tmp_path / "models--org--other"))
    assert engines_folder(other, MACHINE).parent == user_cache
    assert all_engines(other) == []
    assert [is_current for _, is_current in all_engines(open_bundle(snapshot))] == [True]


def test_engines_of_a_repository_are_not_used(tiny_tensorrt_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_tensorrt_bundle, bundle)
    assert build(bundle) == 0
    snapshot = in_hub_cache(tiny_tensorrt_bundle, tmp_path / "models--org--name")
    shutil.copytree(bundle / "engines", snapshot / "engines")
    with pytest.raises(DeviceError, match="has no engines for"):
        open_engines(open_bundle(snapshot), MACHINE)


def test_snapshots(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(snapshot)
    (tmp_path / "snapshots/copy").mkdir(parents=True)
    (snapshot / "inside").mkdir()
    assert is_snapshot(snapshot)
    assert is_snapshot(snapshot / "inside")
    assert is_snapshot(tmp_path / "link")
    assert not is_snapshot(snapshot.parent)
    assert not is_snapshot(tmp_path / "snapshots/copy")  # without blobs
    assert not is_snapshot(Path("/"))
