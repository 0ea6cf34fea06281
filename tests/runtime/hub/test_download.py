"""A bundle of the hub: what is downloaded, checked and kept, against a local stand-in of the hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from fakes.fake_hub import TOKEN, FakeHub, Repository, fake_hub
from huggingface_hub import constants
from support.hub_cache import NOT_OF_THE_BUNDLE, content
from support.hub_client import environment
from support.paths import ROOT

from fusion_edge.runtime.bundle.reader import open_bundle, verify
from fusion_edge.runtime.cli import info as cli_info
from fusion_edge.runtime.errors import FusionError, UsageError
from fusion_edge.runtime.hub import client
from fusion_edge.runtime.hub.bundle_source import BundleSource, find_bundle
from fusion_edge.runtime.loading import load

Refuse = Callable[..., str]


def listed(files: dict[str, bytes]) -> set[str]:
    return set(files) - set(NOT_OF_THE_BUNDLE)


def edit(files: dict[str, bytes], change: Callable[[Any], object]) -> None:
    manifest = json.loads(files["bundle.json"])
    change(manifest)
    files["bundle.json"] = json.dumps(manifest).encode()


# What is downloaded ------------------------------------------------------------------------------------------


def test_only_the_listed_files_are_downloaded(hub: FakeHub, files: dict[str, bytes], cache: Path) -> None:
    commit = hub.add("org/name", files)
    source = find_bundle("org/name")
    folder = cache / "models--org--name" / "snapshots" / commit
    assert source == BundleSource(str(folder), "org/name", commit)
    assert str(source) == f"org/name at commit {commit[:12]}, in {folder}"
    assert content(folder) == listed(files)
    assert {request.rpartition("/")[2] for request in hub.asked("^GET .*/resolve/")} == listed(files)
    verify(open_bundle(folder))
    assert all(path.is_symlink() for path in folder.iterdir())


def test_a_second_use_downloads_nothing(hub: FakeHub, files: dict[str, bytes]) -> None:
    commit = hub.add("org/name", files)
    first = find_bundle("org/name")
    hub.requests.clear()
    assert find_bundle("org/name") == first
    assert hub.requests == ["GET /api/models/org/name"]
    hub.requests.clear()
    assert find_bundle("org/name", commit) == first  # a commit never changes
    assert hub.requests == []


def test_revisions(hub: FakeHub, files: dict[str, bytes], tiny_tensorrt_bundle: Path) -> None:
    old = hub.add("org/name", files)
    new = hub.add("org/name", {file.name: file.read_bytes() for file in tiny_tensorrt_bundle.iterdir()}, "jetson/orin")
    for revision, commit, target in ((None, old, "cpu"), ("jetson/orin", new, "tensorrt"), (new, new, "tensorrt")):
        source = find_bundle("org/name", revision)
        assert source.commit == commit
        assert open_bundle(source.folder).manifest.target == target


def test_a_newer_commit_downloads_what_is_new(hub: FakeHub, files: dict[str, bytes]) -> None:
    hub.add("org/name", files)
    find_bundle("org/name")
    edit(files, lambda manifest: manifest.update(source="another"))
    commit = hub.add("org/name", files)
    hub.requests.clear()
    assert find_bundle("org/name").commit == commit
    assert [request.rpartition("/")[2] for request in hub.asked("^GET .*/resolve/")] == ["bundle.json"]


def test_several_downloads_at_once(hub: FakeHub, files: dict[str, bytes]) -> None:
    commit = hub.add("org/name", files)
    start = Barrier(4)

    def find(_: int) -> BundleSource:
        start.wait()
        return find_bundle("org/name")

    with ThreadPoolExecutor(4) as pool:
        sources = set(pool.map(find, range(4)))
    assert [source.commit for source in sources] == [commit]
    verify(open_bundle(sources.pop().folder))
    fetched = [request.rpartition("/")[2] for request in hub.asked("^GET .*/resolve/")]
    assert sorted(fetched) == sorted(listed(files))  # each file once


def test_load_and_commands_take_a_hub_id(
    hub: FakeHub, files: dict[str, bytes], capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    commit = hub.add("org/name", files)
    with load("org/name", revision="main", threads=1) as fusion:
        assert fusion.manifest.target == "cpu"
    assert cli_info.main(["org/name", "--revision", commit]) == 0
    printed = capsys.readouterr()
    assert f"org/name at commit {commit}\n" in printed.out
    assert str(cache / "models--org--name/snapshots" / commit) in printed.out
    assert printed.err == ""  # not a terminal: no progress


def test_a_local_folder_wins(hub: FakeHub, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org/name").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    source = find_bundle("org/name")
    assert (source.folder, source.hub_id, str(source)) == ("org/name", "", "local folder org/name")
    with pytest.raises(UsageError, match="The revision v1 does not apply to the local folder org/name: leave it out"):
        find_bundle("org/name", "v1")
    assert hub.requests == []


@pytest.mark.parametrize("source", ["./org/name", "/org/name", "../x", "name", "a/b/c", "org/name/", Path("org/name")])
def test_paths_never_ask_the_hub(
    hub: FakeHub, source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FusionError, match="is not a folder; expected a bundle"):
        load(source)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "..", "../x", "a/../b", "a//b", "/a", "a b", "-x y", "é", "refs/../../x"])
def test_wrong_revisions(hub: FakeHub, revision: str) -> None:
    with pytest.raises(UsageError, match="expected a branch, tag or commit"):
        find_bundle("org/name", revision)
    assert hub.requests == []


def test_wrong_arguments(hub: FakeHub) -> None:
    revision: Any = 3
    with pytest.raises(UsageError, match="The revision is of type int; expected a branch, tag or commit"):
        find_bundle("org/name", revision)
    with pytest.raises(FusionError, match=r"https://huggingface\.co/org/name is a URL: pass its hub id"):
        find_bundle("https://huggingface.co/org/name")
    with pytest.raises(FusionError, match="org/a--b is not a valid hub id: pass org/name or an existing folder"):
        find_bundle("org/a--b")


def test_a_command_in_the_environment_of_its_user(hub: FakeHub, files: dict[str, bytes], cache: Path) -> None:
    """The client reads its settings when it is imported."""
    commit = hub.add("org/name", files)
    command = [sys.executable, "-m", "fusion_edge.runtime.cli.info", "org/name"]
    outputs = [
        subprocess.run(command, env=os.environ | environment(hub, cache) | more, check=True, capture_output=True)
        for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"})
    ]
    for output in outputs:
        assert f"org/name at commit {commit}\n" in output.stdout.decode()
        assert output.stderr == b""


# What the hub refuses ----------------------------------------------------------------------------------------


def test_unknown_repositories_and_revisions(hub: FakeHub, files: dict[str, bytes], refused: Refuse) -> None:
    hub.add("org/name", files)
    assert "org/none is neither a local folder nor a repository that you can access" in refused(
        cli_info.main, "org/none"
    )
    assert "org/name has no revision v9: pass an existing branch, tag or commit, or none." in refused(
        cli_info.main, "org/name", "--revision=v9"
    )


def test_gated_and_private(hub: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    hub.add("org/name", files)
    hub.repositories["org/name"].gated = True
    with pytest.raises(FusionError, match=r"org/name is a gated repository: accept its terms .* `hf auth login`"):
        find_bundle("org/name")
    hub.repositories["org/name"].private = True
    with pytest.raises(FusionError, match=r"neither .* nor a repository that you can access: .* if it is private"):
        find_bundle("org/name")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_bundle(find_bundle("org/name").folder)


def test_a_checkpoint(hub: FakeHub, refused: Refuse) -> None:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"\0" * 9000})
    assert "org/model is a checkpoint, not a bundle: run fusion-export org/model -o BUNDLE" in refused(
        cli_info.main, "org/model"
    )
    hub.add("org/text", {"README.md": b""})
    assert "org/text is not a bundle: it has no bundle.json." in refused(cli_info.main, "org/text")
    assert not hub.asked("resolve")


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_a_hub_that_does_not_answer(hub: FakeHub, files: dict[str, bytes], refused: Refuse, status: int) -> None:
    """Without a cached bundle it is an error; with one, the bundle is used and a note says so."""
    commit = hub.add("org/name", files)
    hub.broken["GET /api/models"] = status
    message = refused(cli_info.main, "org/name")
    assert message.startswith("error: org/name could not be downloaded (")
    assert str(status) in message
    hub.broken.clear()
    find_bundle("org/name")
    hub.broken["GET /api/models"] = status
    source = find_bundle("org/name")
    assert (source.commit, str(status) in source.unreachable) == (commit, True)


def test_no_network(
    hub: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/name", files)
    find_bundle("org/name")
    with fake_hub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(FusionError, match=r"org/other could not be downloaded \(.+\): check the network"):
        find_bundle("org/other")
    assert cli_info.main(["org/name"]) == 0
    assert capsys.readouterr().err.startswith("note: no update from the hub (")


def test_a_refusal_is_not_hidden_by_the_cache(hub: FakeHub, files: dict[str, bytes]) -> None:
    hub.add("org/name", files)
    find_bundle("org/name")
    hub.broken["GET /api/models"] = 403
    with pytest.raises(FusionError, match=r"org/name could not be downloaded \(403 Forbidden: broken on purpose"):
        find_bundle("org/name")
    hub.broken.clear()
    del hub.repositories["org/name"]
    with pytest.raises(FusionError, match="neither a local folder nor a repository"):
        find_bundle("org/name")


@pytest.mark.parametrize("broken", ["GET .*/llm.data", "HEAD .*/llm.data", "HEAD .*/bundle.json"])
def test_an_update_that_fails(
    hub: FakeHub,
    files: dict[str, bytes],
    tiny_tensorrt_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    """The earlier bundle is used."""
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries
    old = hub.add("org/name", files)
    find_bundle("org/name")
    hub.add("org/name", {file.name: file.read_bytes() for file in tiny_tensorrt_bundle.iterdir()})
    hub.broken[broken] = 500
    source = find_bundle("org/name")
    assert (source.commit, "500" in source.unreachable) == (old, True)
    hub.broken[broken] = 403
    with pytest.raises(FusionError, match=r"org/name could not be downloaded \(403 Forbidden: broken on purpose"):
        find_bundle("org/name")


def test_an_answer_without_a_commit(hub: FakeHub, files: dict[str, bytes]) -> None:
    hub.repositories["org/name"] = Repository({"../../x": files}, {"main": "../../x"})
    with pytest.raises(FusionError, match=r"could not be downloaded \(the hub gave '../../x' for a commit\)"):
        find_bundle("org/name")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = "There is no folder org/name, and the hub needs huggingface_hub 1.8 or newer"
    with monkeypatch.context() as old:
        old.setattr(client, "version", lambda _: "0.36.2")
        with pytest.raises(FusionError, match=re.escape(f"{needed}, not 0.36.2: run pip install '.[hub]' in a clone")):
            find_bundle("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FusionError, match=re.escape(f"{needed}: run pip install '.[hub]' in a clone")):
        find_bundle("org/name")


def test_the_oldest_client_is_that_of_the_extra() -> None:
    requirement = f"huggingface_hub>={'.'.join(map(str, client.OLDEST_CLIENT))}"
    assert f'hub = ["{requirement}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# What the manifest may list ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../evil", "a/../../evil", "/tmp/evil"])
def test_paths_that_lead_outside(hub: FakeHub, files: dict[str, bytes], cache: Path, path: str) -> None:
    edit(files, lambda manifest: manifest["files"][0].update(path=path))
    hub.add("org/name", files | {path: b"evil"})
    with pytest.raises(FusionError, match="which leads outside its folder; do not use it"):
        find_bundle("org/name")
    assert len(hub.asked("^GET .*/resolve/")) == 1  # bundle.json
    assert not list(cache.parent.rglob("evil"))


@pytest.mark.parametrize("change", ["missing", "size", "sha256"])
def test_a_repository_that_is_not_what_its_manifest_says(hub: FakeHub, files: dict[str, bytes], change: str) -> None:
    """What the hub tells about its files is compared before they are downloaded."""
    data = files.pop("llm.data")
    if change != "missing":
        files["llm.data"] = data + b"x" if change == "size" else data[:-1] + bytes([data[-1] ^ 1])
    hub.add("org/name", files)
    expected = "which the repository lacks" if change == "missing" else "but the repository holds another file"
    with pytest.raises(FusionError, match=f"bundle.json of org/name lists 'llm.data', {expected}.*push the bundle"):
        find_bundle("org/name")
    assert len(hub.asked("^GET .*/resolve/")) == 1


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"{}", "does not follow bundle schema"),
        (b"[" * 5000, "cannot be read"),
        (b" " * (3 << 20), "has a bundle.json of 3145728 bytes; expected at most 2097152"),
    ],
)
def test_bad_manifests(hub: FakeHub, manifest: bytes, message: str) -> None:
    hub.add("org/name", {"bundle.json": manifest})
    with pytest.raises(FusionError, match=message):
        find_bundle("org/name")
