"""Damaged, cut and interrupted downloads, full disks, and the cache without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.fake_hub import FakeHub
from huggingface_hub import constants
from support.hub_cache import content

from fusion_edge.runtime.bundle.reader import open_bundle, verify
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.errors import FusionError
from fusion_edge.runtime.hub import download
from fusion_edge.runtime.hub.bundle_source import find_bundle

Refuse = Callable[..., str]


@pytest.mark.parametrize("name", ["llm.data", "tokenizer.json", "quantization.json"])
def test_a_damaged_download(hub: FakeHub, files: dict[str, bytes], cache: Path, name: str) -> None:
    """It is found by its SHA-256 and deleted; the next run downloads that file alone."""
    commit = hub.add("org/name", files)
    hub.altered[name] = bytes([files[name][0] ^ 1]) + files[name][1:]
    with pytest.raises(FusionError, match=rf"{name} has been altered: its SHA-256 .* It is deleted. Run again"):
        find_bundle("org/name")
    snapshot = cache / "models--org--name/snapshots" / commit
    assert name not in content(snapshot)
    assert not (cache / "models--org--name/refs/main").exists()
    hub.altered.clear()
    hub.requests.clear()
    verify(open_bundle(find_bundle("org/name").folder))
    assert [request.rpartition("/")[2] for request in hub.asked("^GET .*/resolve/")] == [name]


def test_a_cut_download(hub: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries
    hub.add("org/name", files)
    hub.cut.add("llm.data")
    with pytest.raises(FusionError, match=r"org/name could not be downloaded \("):
        find_bundle("org/name")
    assert not list(cache.rglob("*.incomplete"))
    hub.cut.clear()
    verify(open_bundle(find_bundle("org/name").folder))


@pytest.mark.parametrize("name", ["llm.data", "bundle.json"])
def test_a_file_of_the_cache_that_was_cut(hub: FakeHub, files: dict[str, bytes], name: str) -> None:
    """As a power failure may leave it: empty. It is downloaded again."""
    hub.add("org/name", files)
    folder = Path(find_bundle("org/name").folder)
    (folder / name).resolve().write_bytes(b"")
    verify(open_bundle(find_bundle("org/name").folder))
    assert (folder / name).read_bytes() == files[name]


def test_a_blob_that_changed_later(hub: FakeHub, files: dict[str, bytes], refused: Refuse) -> None:
    hub.add("org/name", files)
    folder = Path(find_bundle("org/name").folder)
    (folder / "llm.data").resolve().write_bytes(bytes(len(files["llm.data"])))
    message = refused(cli_info.main, "org/name")
    assert f"{folder}/llm.data has been altered" in message
    assert "Delete that file, and load the bundle by its hub id: it is downloaded again." in message
    (folder / "llm.data").unlink()
    assert "It is deleted. Run again" in refused(cli_info.main, "org/name")  # the blob is still the altered one
    assert cli_info.main(["org/name"]) == 0


@pytest.mark.parametrize("stage", ["_fetch", "check_digest"])
def test_ctrl_c(
    hub: FakeHub,
    files: dict[str, bytes],
    tiny_tensorrt_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    stage: str,
) -> None:
    """The earlier bundle stays in use; nothing unverified stays in the new snapshot."""
    old = hub.add("org/name", files)
    find_bundle("org/name")
    new = hub.add("org/name", {file.name: file.read_bytes() for file in tiny_tensorrt_bundle.iterdir()})
    place: Any = download._Download if stage == "_fetch" else download
    original = getattr(place, stage)
    calls: list[object] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(place, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_bundle("org/name")
    repository = cache / "models--org--name"
    assert (repository / "refs/main").read_text() == old
    assert len(content(repository / "snapshots" / new)) == (1 if stage == "_fetch" else 4)  # verified ones stay
    assert not list(cache.rglob("*.incomplete"))
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert find_bundle("org/name").commit == old
    monkeypatch.setattr(place, stage, original)
    assert find_bundle("org/name").commit == new
    assert (repository / "refs/main").read_text() == new


def test_a_full_disk(hub: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", files)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000))
    with pytest.raises(FusionError, match=r"has 200.00 kB free; org/name needs .* set HF_HUB_CACHE"):
        find_bundle("org/name")


def test_offline(hub: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    commit = hub.add("org/name", files)
    find_bundle("org/name")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        assert find_bundle("org/name", revision).commit == commit
    for hub_id, revision in (("org/other", None), ("org/name", "v2")):
        with pytest.raises(FusionError, match="is not complete in the local cache, and HF_HUB_OFFLINE forbids"):
            find_bundle(hub_id, revision)
    (cache / "models--org--name/snapshots" / commit / "llm.onnx").unlink()
    with pytest.raises(FusionError, match="is not complete in the local cache, and HF_HUB_OFFLINE forbids"):
        find_bundle("org/name")
    assert hub.requests == []


def test_a_cache_that_is_only_readable(hub: FakeHub, files: dict[str, bytes], cache: Path) -> None:
    """A complete snapshot is used even if the branch cannot be noted."""
    commit = hub.add("org/name", files)
    find_bundle("org/name")
    shutil.rmtree(cache / "models--org--name/refs")
    (cache / "models--org--name/refs").write_bytes(b"")  # no folder can be made there, even by root
    assert find_bundle("org/name").commit == commit
