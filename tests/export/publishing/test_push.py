"""``fusion-export --push-to-hub`` against a local stand-in of the hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
from fakes.fake_hub import READER, TOKEN, FakeHub, fake_hub
from huggingface_hub import ModelCard, constants
from support.hub_client import use_hub

from fusion_edge.export import cli
from fusion_edge.export.publishing.model_card import MARK
from fusion_edge.runtime.bundle.reader import open_bundle, verify
from fusion_edge.runtime.hub.bundle_source import find_bundle
from fusion_edge.runtime.system import interruptible

Refuse = Callable[..., str]
PUSH = "--push-to-hub=org/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache", TOKEN)
        yield hub


def pushed(hub: FakeHub, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories["org/name"]
    return repository.commits[repository.branches[branch]]


def metadata(card: bytes) -> dict[str, Any]:
    data: Any = ModelCard(card.decode()).data
    return dict(data.to_dict())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Publish -----------------------------------------------------------------------------------------------------


def test_export_and_push(hub: FakeHub, tiny_checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tiny_checkpoint), "-o", str(output), "--int4", PUSH]) == 0
    files = pushed(hub)
    card = files.pop("README.md").decode()
    del files[".gitattributes"]
    assert files == contents(output)  # no card in the folder
    printed = capsys.readouterr()
    commit = hub.repositories["org/name"].branches["main"]
    assert printed.out.endswith(f"\n{output}: published as {hub.url}/org/name at commit {commit}\n")
    assert printed.err == ""
    assert not hub.repositories["org/name"].private
    assert "fusion-run org/name --image" in card
    source = find_bundle("org/name")
    verify(open_bundle(source.folder))
    assert source.commit == commit


def test_access_is_checked_before_the_export(
    hub: FakeHub, tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def write(*_: Any) -> Any:
        asked.extend(hub.requests)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "write_bundle", write)
    assert cli.main([str(tiny_checkpoint), "-o", str(output), PUSH, "--hub-branch=v1"]) == 130
    assert asked == [
        "GET /api/whoami-v2",
        "POST /api/repos/create",
        "GET /api/models/org/name/auth-check/write",
        "POST /api/models/org/name/branch/v1",
    ]


def test_a_bundle_that_exists(hub: FakeHub, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tiny_bundle), PUSH, "--hub-branch=jetson/orin", "--private", "--json"]) == 0
    published = json.loads(capsys.readouterr().out)
    repository = hub.repositories["org/name"]
    assert published == {
        "bundle": str(tiny_bundle),
        "hub": {"url": f"{hub.url}/org/name", "commit": repository.branches["jetson/orin"]},
    }
    assert repository.private
    assert pushed(hub, "main") == {".gitattributes": b""}
    assert contents(tiny_bundle).items() <= pushed(hub, "jetson/orin").items()


def test_a_second_push_replaces_the_bundle(hub: FakeHub, tiny_bundle: Path, tiny_tensorrt_bundle: Path) -> None:
    """Files of the earlier bundle go, all others stay."""
    hub.add("org/name", {".gitattributes": b"", "model.onnx": b"of somebody"})
    for folder in (tiny_bundle, tiny_tensorrt_bundle):
        assert cli.main([str(folder), PUSH]) == 0
    files = pushed(hub)
    assert "quantization.json" in contents(tiny_bundle)
    assert files.keys() == contents(tiny_tensorrt_bundle).keys() | {"README.md", ".gitattributes", "model.onnx"}
    assert "fusion-build org/name\n" in files["README.md"].decode()


def test_the_same_bundle_again(hub: FakeHub, tiny_bundle: Path) -> None:
    assert cli.main([str(tiny_bundle), PUSH]) == 0
    files = pushed(hub)
    stored = dict(hub.stored)
    hub.requests.clear()
    assert cli.main([str(tiny_bundle), PUSH]) == 0
    assert (pushed(hub), hub.stored) == (files, stored)
    assert not hub.asked("PUT")


@pytest.mark.parametrize(("text", "is_kept"), [("# Mine", True), (f"---\nlicense: mit\n---\n{MARK}\n# Old", False)])
def test_a_card_of_the_user_is_kept(hub: FakeHub, tiny_bundle: Path, text: str, is_kept: bool) -> None:
    hub.add("org/name", {"README.md": text.encode()})
    assert cli.main([str(tiny_bundle), PUSH]) == 0
    assert (pushed(hub)["README.md"] == text.encode()) is is_kept


def test_other_files_beside_a_bundle(hub: FakeHub, tiny_bundle: Path, tmp_path: Path) -> None:
    """A clone of the repository has a card, too. It is neither checked nor published."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "clone")
    (folder / "README.md").write_text("# Mine")
    (folder / "secret.txt").write_text("secret")
    open_bundle(folder)
    assert cli.main([str(folder), PUSH]) == 0
    assert pushed(hub).keys() == contents(tiny_bundle).keys() | {"README.md", ".gitattributes"}
    assert MARK in pushed(hub)["README.md"].decode()


# The model card ----------------------------------------------------------------------------------------------


def test_model_card(hub: FakeHub, tiny_bundle: Path) -> None:
    assert cli.main([str(tiny_bundle), PUSH]) == 0
    card = pushed(hub)["README.md"]
    assert metadata(card) == {
        "library_name": "fusion-edge",
        "pipeline_tag": "image-text-to-text",
        "tags": ["fusion", "fusion-edge", "onnx", "robotics", "int4", "cpu"],
    }
    for line in ("# name", "| Context | 512 tokens, float32 KV cache |", "| Calibration | none |", "| Target | cpu |"):
        assert f"\n{line}\n" in card.decode()


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\ntags: [x]\n---\n",
            {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"},
        ),
        ("no front matter", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: {open\n---\n", {}),
        ("---\nlicense: 'mit'\r\n---\r\nlicense: x\n", {"license": "mit"}),
        ("---\ntags: []\n---\nlicense: x\n---\n", {}),
    ],
)
def test_license_of_the_checkpoint(
    hub: FakeHub, tiny_checkpoint: Path, output: Path, tmp_path: Path, front: str, expected: dict[str, str]
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "README.md").write_text(front)
    assert cli.main([str(checkpoint), "-o", str(output), PUSH]) == 0
    data = metadata(pushed(hub)["README.md"])
    assert {name: value for name, value in data.items() if name.startswith("license")} == expected


def test_a_checkpoint_of_the_hub(hub: FakeHub, tiny_checkpoint: Path, output: Path) -> None:
    """Its id is the base model, and its card on the hub names the license."""
    files = {file.name: file.read_bytes() for file in tiny_checkpoint.iterdir()}
    hub.add("lab/FUSION-tiny", files | {"README.md": b"---\nlicense: mit\n---\n"})
    assert cli.main(["lab/FUSION-tiny", "-o", str(output), PUSH]) == 0
    assert open_bundle(output).manifest.source == "lab/FUSION-tiny"
    data = metadata(pushed(hub)["README.md"])
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("lab/FUSION-tiny", "quantized", "mit")
    del hub.repositories["lab/FUSION-tiny"]
    assert cli.main([str(output), PUSH]) == 0
    assert "license" not in metadata(pushed(hub)["README.md"])


def test_a_hostile_name_is_no_markup(hub: FakeHub, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["source"] = "x`](http://evil)\n---\nlicense: mit <script>|"
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert cli.main([str(folder), PUSH]) == 0
    card = pushed(hub)["README.md"]
    assert "license" not in metadata(card)
    assert "<script>" not in card.decode().replace("\\<", "")
    assert "](http://evil)" not in card.decode().replace("\\]", "")


# Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "Pushing to org/name needs a login: run `hf auth login`"),
        ("hf_unknown", "Pushing to org/name needs a valid token"),
        (READER, "You may not write to org/name"),
    ],
)
def test_no_access(
    hub: FakeHub, tiny_checkpoint: Path, output: Path, refused: Refuse, token: str, message: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    for exists in (False, True):
        if exists:
            hub.add("org/name", {})
        assert message in refused(cli.main, tiny_checkpoint, "-o", output, PUSH)
        assert not output.exists()


def test_a_public_repository_is_not_private(hub: FakeHub, tiny_bundle: Path, refused: Refuse) -> None:
    hub.add("org/name", {})
    assert "org/name exists and is public: make it private" in refused(cli.main, tiny_bundle, PUSH, "--private")
    assert pushed(hub) == {}


def test_offline(hub: FakeHub, tiny_bundle: Path, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids --push-to-hub" in refused(cli.main, tiny_bundle, PUSH)


def test_no_network(hub: FakeHub, tiny_bundle: Path, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    assert "org/name cannot be prepared for a push (" in refused(cli.main, tiny_bundle, PUSH)


@pytest.mark.parametrize("request_", ["preupload", "objects/batch", "PUT", "/commit/"])
def test_a_failed_upload(
    hub: FakeHub,
    tiny_checkpoint: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    request_: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bundle is complete, nothing is published, and the error gives the command that publishes it."""
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries
    hub.broken[request_] = 507
    command = [str(tiny_checkpoint), "-o", str(output), PUSH, "--hub-branch=v1"]
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    assert f"{output}: " in printed.out
    (error,) = printed.err.splitlines()
    assert error.startswith(f"error: {output} is complete but not published (")
    assert error.endswith(f"; publish it: fusion-export {output} --push-to-hub org/name --hub-branch v1")
    assert pushed(hub, "v1") == {".gitattributes": b""}
    hub.broken.clear()
    assert cli.main([str(output), PUSH, "--hub-branch", "v1"]) == 0
    assert "llm.data" in pushed(hub, "v1")


def test_ctrl_c_during_the_upload(
    hub: FakeHub, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the command, although the client's threads wait for the network; nothing is published."""
    released, exits = Event(), list[int]()
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries

    first = Lock()

    def interrupt() -> None:
        if first.acquire(blocking=False):  # one signal; the client uploads several files at once
            os.kill(os.getpid(), signal.SIGINT)
        released.wait(30)

    hub.before["^PUT"] = interrupt
    assert cli.main([str(tiny_bundle), PUSH]) == 130
    assert exits == [130]
    assert capsys.readouterr().err == "interrupted\n"
    hub.broken["."] = 500  # this process lives on, and so do the client's threads
    released.set()
    job = interruptible._abandoned[-1]
    job.wait(30)
    assert job.is_done
    assert job.error is not None
    assert pushed(hub) == {".gitattributes": b""}


def test_a_damaged_bundle(hub: FakeHub, tiny_bundle: Path, tmp_path: Path, refused: Refuse) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    content = bytearray((folder / "llm.data").read_bytes())
    content[0] ^= 1
    (folder / "llm.data").write_bytes(content)
    assert "llm.data has been altered" in refused(cli.main, folder, PUSH)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private only works with --push-to-hub ORG/NAME; add it."),
        (["--hub-branch=v1"], "--hub-branch only works with --push-to-hub ORG/NAME; add it."),
        ([PUSH, "--dry-run"], "--dry-run writes nothing, and --push-to-hub publishes; drop one."),
        (["--push-to-hub=name"], "--push-to-hub name is not a hub id; expected org/name."),
        ([PUSH, "--hub-branch=../x"], "--hub-branch ../x is not the name of a branch."),
    ],
)
def test_wrong_options(
    hub: FakeHub, tiny_checkpoint: Path, output: Path, refused: Refuse, options: list[str], message: str
) -> None:
    assert message in refused(cli.main, tiny_checkpoint, "-o", output, *options, code=2)
    assert hub.requests == []


@pytest.mark.parametrize("option", ["--int8", "-o=x", "--max-context=64", "--force", "--rule=llm.*=int8", "--fit=1GB"])
def test_a_bundle_is_not_exported_again(hub: FakeHub, tiny_bundle: Path, refused: Refuse, option: str) -> None:
    message = refused(cli.main, tiny_bundle, PUSH, option, code=2)
    assert f"{tiny_bundle} is a bundle, which is published as it is; drop the options of an export." in message


def test_an_output_that_exists(hub: FakeHub, tiny_checkpoint: Path, replaceable: Path, refused: Refuse) -> None:
    """It is refused before a repository is created."""
    assert "exists; choose another output" in refused(cli.main, tiny_checkpoint, "-o", replaceable, PUSH)
    assert hub.requests == []
